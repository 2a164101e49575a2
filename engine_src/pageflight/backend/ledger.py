"""A stub's ledger: what it has open and that it lives, in a file that outlives the process.

Triton neither starts a stub again that has died nor ends the requests it had: their clients would wait for ever. So a
stub writes down each request that it has open, as the two words by which tritonserver knows it, and strikes it out
before it sends the last response. The watchdog of `pageflight serve` reads who lives; `orphans` ends what a dead stub
has left; who drains the server reads how much is open.

A request goes through three states. From its arrival it is *pending*: tritonserver waits for the stub to take it over,
and answers the client itself when the stub dies. Then it is *open*: nobody but the stub would end it. At its end it is
struck out. When a stub dies with a request pending, its count of requests and tritonserver's tell which of the two it
was: the word came, or it did not.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import struct
import threading
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from pageflight.backend.settings import ModelSettings
from pageflight.loop.address import make_stub_folder, process_start

Kind = Literal["front", "preprocessing", "postprocessing"]
Words = tuple[int, int]
"""Addresses of a request and of its response factory in tritonserver; never 0 while the request is open."""

PULSE_INTERVAL_S = 1.0
_MAX_OPEN = 1 << 16
_HEADER = struct.Struct("=QQQQQ")  # version of the layout, pulse in ns (monotonic), slots used, requests, open requests
_PULSE_AT, _NUM_SLOTS_AT, _NUM_REQUESTS_AT, _NUM_OPEN_AT = 8, 16, 24, 32
_PENDING = 1  # in the first word: addresses are even
_OWNER = slice(64, 4096)
_SLOT = struct.Struct("=QQ")
_WORD = struct.Struct("=Q")
_FIRST_SLOT = 4096
_SIZE = _FIRST_SLOT + _MAX_OPEN * _SLOT.size
_VERSION = 2


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """Whose ledger it is. Starts (clock ticks since boot) tell processes from later ones with the same number.

    `secret` is random and shown to nobody: who names it may read this folder, which is its user's alone.
    """

    model: str
    instance: int
    kind: Kind
    stub_pid: int
    stub_start: int
    server_pid: int
    server_start: int
    secret: str

    @property
    def is_alive(self) -> bool:
        return process_start(self.stub_pid) == self.stub_start


class Ledger:
    """The stub's own side. Safe to use from several threads."""

    def __init__(self, settings: ModelSettings, kind: Kind) -> None:
        """Opens the ledger; a thread of its own keeps the pulse."""
        owner = Owner(
            model=settings.name,
            instance=settings.instance,
            kind=kind,
            stub_pid=os.getpid(),
            stub_start=process_start(os.getpid()) or 0,
            server_pid=settings.server_pid,
            server_start=process_start(settings.server_pid) or 0,
            secret=secrets.token_hex(32),
        )
        self._path = make_stub_folder(settings.server_pid) / str(owner.stub_pid)
        written = self._path.with_suffix(".new")
        with written.open("w+b") as file:
            file.truncate(_SIZE)
            self._map = mmap.mmap(file.fileno(), _SIZE)
        entry = msgspec.json.encode(owner)
        self._map[_OWNER.start : _OWNER.start + len(entry)] = entry
        _WORD.pack_into(self._map, 0, _VERSION)
        self._free: list[int] = []
        self._num_slots = self._num_requests = self._num_open = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._beat()
        written.rename(self._path)
        self._thread = threading.Thread(target=self._keep_pulse, name="ledger-pulse", daemon=True)
        self._thread.start()

    def enter(self, words: Words | None) -> int | None:
        """Count a request that has come and note it as pending; its slot, or None when there are too many.

        Without `words` it is counted only. Either way `leave` is to be called when it ends.
        """
        with self._lock:
            self._num_requests += 1
            _WORD.pack_into(self._map, _NUM_REQUESTS_AT, self._num_requests)
            self._count_open(1)
            if words is None:
                return None
            if self._free:
                slot = self._free.pop()
            elif self._num_slots < _MAX_OPEN:
                slot = self._num_slots
                self._num_slots += 1
                _WORD.pack_into(self._map, _NUM_SLOTS_AT, self._num_slots)
            else:
                return None
        request, factory = words
        _SLOT.pack_into(self._map, _place(slot), request | _PENDING, factory)
        return slot

    def take_over(self, slot: int) -> None:
        """A pending request is open: tritonserver has let go of it."""
        (request,) = _WORD.unpack_from(self._map, _place(slot))
        _WORD.pack_into(self._map, _place(slot), request & ~_PENDING)

    def leave(self, slot: int | None) -> None:
        """The request that got this slot is about to end."""
        if slot is not None:
            _SLOT.pack_into(self._map, _place(slot), 0, 0)
        with self._lock:
            self._count_open(-1)
            if slot is not None:
                self._free.append(slot)

    @contextmanager
    def counting(self, num_requests: int) -> Iterator[None]:
        """These requests are answered within the block; tritonserver ends them itself when the stub dies."""
        with self._lock:
            self._count_open(num_requests)
        try:
            yield
        finally:
            with self._lock:
                self._count_open(-num_requests)

    def close(self) -> None:
        """The stub ends as it should, with nothing open."""
        self._closing.set()
        self._thread.join()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    def _count_open(self, difference: int) -> None:
        self._num_open += difference
        _WORD.pack_into(self._map, _NUM_OPEN_AT, self._num_open)

    def _keep_pulse(self) -> None:
        while not self._closing.wait(PULSE_INTERVAL_S):
            self._beat()

    def _beat(self) -> None:
        _WORD.pack_into(self._map, _PULSE_AT, time.monotonic_ns())


@dataclass(frozen=True, slots=True)
class Page:
    """A ledger as another process reads it."""

    path: Path
    owner: Owner

    @property
    def claimed(self) -> Path:
        """Where it lies while somebody ends the requests of its dead stub."""
        return self.path.with_suffix(".claimed")

    @property
    def given_up(self) -> Path:
        """Where it lies when that could not be done."""
        return self.path.with_suffix(".given-up")

    @classmethod
    def of(cls, path: Path) -> Page | None:
        """None when there is no ledger (any more), or none of this version."""
        try:
            with path.open("rb") as file:
                data = file.read(_OWNER.stop)
        except FileNotFoundError:
            return None
        if len(data) < _OWNER.stop or _HEADER.unpack_from(data)[0] != _VERSION:
            return None
        return cls(path, msgspec.json.decode(data[_OWNER].rstrip(b"\0"), type=Owner))

    def pulse_s(self) -> float | None:
        """When the stub last showed that it lives, on the monotonic clock; None when its ledger is closed."""
        header = self._header()
        return None if header is None else header[1] * 1e-9

    def num_requests(self) -> int:
        """Requests that have come, ended ones as well."""
        header = self._header()
        return 0 if header is None else header[3]

    def num_open(self) -> int:
        """Requests that have come and not ended, whether or not anybody else could end them."""
        header = self._header()
        return 0 if header is None else header[4]

    def open_requests(self) -> tuple[Words, ...]:
        """What only the stub can end."""
        return tuple((request, factory) for _, request, factory in self._entries() if not request & _PENDING)

    def num_pending(self) -> int:
        """Requests of which it is not known whether tritonserver has let go."""
        return sum(request & _PENDING for _, request, _ in self._entries())

    def decide(self, *, are_open: bool) -> None:
        """The pending requests of a dead stub are open, or tritonserver has ended them."""
        num_open, num_pending = self.num_open(), self.num_pending()
        with contextlib.suppress(FileNotFoundError), self.path.open("r+b") as file:
            for slot, request, factory in self._entries():
                if request & _PENDING:
                    file.seek(_place(slot))
                    file.write(_SLOT.pack(request & ~_PENDING, factory) if are_open else _SLOT.pack(0, 0))
            if not are_open:
                file.seek(_NUM_OPEN_AT)
                file.write(_WORD.pack(num_open - num_pending))

    def _header(self) -> tuple[int, ...] | None:
        try:
            with self.path.open("rb") as file:
                return _HEADER.unpack(file.read(_HEADER.size))
        except FileNotFoundError:
            return None

    def _entries(self) -> list[tuple[int, int, int]]:
        """(slot, request, factory) of every slot in use."""
        header = self._header()
        if header is None:
            return []
        with contextlib.suppress(FileNotFoundError):
            data = self.path.read_bytes()[_FIRST_SLOT : _place(header[2])]
            return [(slot, *words) for slot, words in enumerate(_SLOT.iter_unpack(data)) if all(words)]
        return []


def paths(folder: Path) -> list[Path]:
    """The ledgers in a server's folder (`loop.address.stub_folder`), whatever their version."""
    return [path for path in folder.glob("[0-9]*") if not path.suffix]


def pages(folder: Path, skip: Container[Path] = ()) -> list[Page]:
    """The same, opened, but those of `skip`."""
    found = (Page.of(path) for path in paths(folder) if path not in skip)
    return [page for page in found if page is not None]


def _place(slot: int) -> int:
    return _FIRST_SLOT + slot * _SLOT.size
