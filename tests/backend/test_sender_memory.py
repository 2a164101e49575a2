"""Senders that look like those of Triton's Python backend, in memory that these tests own."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pageflight.backend import orphans, sender_memory
from pageflight.backend.ledger import Ledger, Owner, Page, pages
from pageflight.backend.triton import FINAL
from pageflight.core.errors import Unsupported
from pageflight.core.wire import END_REQUESTS_OF
from pageflight.loop.address import stub_folder

SIZE = 192
OWN, ORPHANS = (0x1000, 0x2000), [(0x3000, 0x4000), (0x5000, 0x6000)]


class InferenceResponseSender:
    """What Triton's does with its memory when it sends. `mutex`: bytes of a mutex, 40 on x86-64 and 48 on aarch64."""

    def __init__(self, mutex: int = 40) -> None:
        self.memory = ctypes.create_string_buffer(bytes(range(1, 97)) + bytes(SIZE - 96), SIZE)
        self.closed_at = 96 + mutex
        if mutex == 40:
            self.memory[self.closed_at + 1 : self.closed_at + 8] = b"garbage"  # nobody clears padding
        self.put(0, OWN[0])
        self.put(8, OWN[1])
        self.answered: list[tuple[int, int]] = []

    def get(self, offset: int) -> int:
        return int.from_bytes(self.memory[offset : offset + 8], "little")

    def put(self, offset: int, value: int) -> None:
        self.memory[offset : offset + 8] = value.to_bytes(8, "little")

    def send(self, response: object = None, flags: int = 0) -> None:
        assert self.memory[self.closed_at] == b"\0" and self.get(self.closed_at + 8) == 0, "it has sent already"
        assert flags == FINAL
        self.memory[self.closed_at] = b"\1"
        self.put(self.closed_at + 8, 1)
        self.memory[self.closed_at + 16] = b"\1"
        self.answered.append((self.get(0), self.get(8)))


@pytest.fixture(autouse=True)
def triton_51(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A known server, whose heap holds whatever is asked for."""
    monkeypatch.setattr(sender_memory, "_address_of", lambda sender: ctypes.addressof(sender.memory))
    monkeypatch.setattr(sender_memory.ServerMemory, "holds", lambda self, words: True)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("TRITON_SERVER_VERSION", raising=False)
    sender_memory.is_known_server.cache_clear()
    yield
    sender_memory.is_known_server.cache_clear()


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    """The ledger of a dead stub with two open requests."""
    settings: Any = SimpleNamespace(name="demo", instance=0, server_pid=os.getppid())
    ledger = Ledger(settings, "front")
    for words in ORPHANS:
        slot = ledger.enter(words)
        assert slot is not None
        ledger.take_over(slot)
    (page,) = pages(stub_folder(os.getppid()))
    monkeypatch.setattr(Owner, "is_alive", False)
    yield page
    ledger.close()
    shutil.rmtree(stub_folder(os.getppid()), ignore_errors=True)


def end_orphans(page: Page, sender: InferenceResponseSender) -> bool:
    request: Any = SimpleNamespace(get_response_sender=lambda: sender)
    return orphans.end_orphans({END_REQUESTS_OF: page.owner.secret}, request, [])


def test_a_sender_that_has_ended_its_own_request_ends_the_orphans(page: Page) -> None:
    sender = InferenceResponseSender()
    assert end_orphans(page, sender)
    assert sender.answered == [OWN, *ORPHANS]
    assert (sender.get(0), sender.get(8)) == OWN and sender.memory[sender.closed_at] == b"\1", "it is its own again"
    assert not page.path.exists() and not page.claimed.exists() and not page.given_up.exists()


@pytest.mark.parametrize("mutex", [48, 32, 56])
def test_another_layout_is_noticed_and_left_alone(page: Page, mutex: int) -> None:
    """Fresh flags are zeros wherever they lie: with the mutex of aarch64 every check passed, and addresses of strangers
    were written over whatever was there."""
    sender = InferenceResponseSender(mutex)
    if mutex == 32:
        sender.memory[129:136] = bytes(7)
    assert end_orphans(page, sender)
    assert sender.answered == [OWN]
    assert page.given_up.exists() and not page.path.exists() and not page.claimed.exists()


def on_aarch64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")


def on_an_old_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_SERVER_VERSION", "2.50.0")


@pytest.mark.parametrize("make", [on_aarch64, on_an_old_server])
def test_an_unknown_server_is_not_touched(
    page: Page, make: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(monkeypatch)
    sender = InferenceResponseSender()
    before = sender.memory.raw
    with pytest.raises(Unsupported, match="unknown way"):
        end_orphans(page, sender)
    assert sender.memory.raw == before and sender.answered == [] and page.given_up.exists()
    assert sender_memory.words_of(sender) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("version", ["2.51.0", "2.60.1", "3.0.0"])
def test_later_servers_may_show_that_they_are_alike(page: Page, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_SERVER_VERSION", version)
    sender = InferenceResponseSender()
    assert end_orphans(page, sender) and len(sender.answered) == 3


def test_a_sender_that_changes_anything_else_is_not_known() -> None:
    sender = InferenceResponseSender()
    before = sender_memory.image_of(sender)  # type: ignore[arg-type]
    sender.send(flags=FINAL)
    after = sender_memory.image_of(sender)  # type: ignore[arg-type]
    assert before is not None and after is not None
    assert sender_memory.has_ended_once(before, after)
    for offset in range(len(after) - 1):
        changed = bytearray(after)
        changed[offset] ^= 4
        assert not sender_memory.has_ended_once(before, bytes(changed)), f"byte {offset}"
    assert not sender_memory.has_ended_once(before, before) and not sender_memory.has_ended_once(before, None)
