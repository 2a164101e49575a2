"""Writes and reads recordings (`loop.recording`). A core that is killed loses what came after its last frame."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import msgspec

from pageflight.core.errors import ConfigError
from pageflight.core.plan import Finished, StepPlan, StepResult
from pageflight.loop.recording import (
    FRAME_HEAD_BYTES,
    MAGIC,
    Called,
    Died,
    Entry,
    Header,
    PlanEncoder,
    Planned,
    Settled,
    decode_frame,
    encode,
    encode_frame,
    settled_entry,
)

log = logging.getLogger(__name__)

FLUSH_INTERVAL_S = 0.25
MAX_PENDING = 200_000
"""Entries that may wait for a slow disk."""
_YIELD_EVERY = 16


_Plan = tuple[float, StepPlan]
_Result = tuple[float, StepResult, tuple[Finished, ...], str]


def recording_path(path: Path, instance: int) -> Path:
    """`run.rec` becomes `run.INSTANCE-TIME-PID.rec`: every life of every core has a file of its own."""
    now = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    return path.with_name(f"{path.stem}.{instance}-{now}-{os.getpid()}{path.suffix}")


class Recorder:
    """One recording. Its owner only hands over what it has; a thread of its own encodes and writes.

    So what is handed over must not change afterwards, which plans, results and requests never do.
    """

    def __init__(self, path: Path, header: Header) -> None:
        """Create `path`. Raises ConfigError when that cannot be."""
        try:
            self._file = path.open("xb", buffering=0)
        except OSError as error:
            raise ConfigError(f"record={path}: {error.strerror or error}") from None
        self.path = path
        self._plans, self._id_type = PlanEncoder(), header.id_type
        self._pending: deque[Entry | _Plan | _Result] = deque([header])
        self._is_broken = False
        self._closing = threading.Event()
        self._write_out(MAGIC)
        self._write()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def add(self, entry: Called | Planned | Settled | Died) -> None:
        if not self._is_broken:
            self._pending.append(entry)

    def add_plan(self, now_s: float, plan: StepPlan) -> None:
        if not self._is_broken:
            self._pending.append((now_s, plan))

    def add_settled(self, now_s: float, result: StepResult, finished: tuple[Finished, ...], raised: str = "") -> None:
        if not self._is_broken:
            self._pending.append((now_s, result, finished, raised))

    def close(self) -> None:
        """Write what is left. Nothing may be added any more."""
        self._closing.set()
        self._thread.join()
        self._file.close()

    def _run(self) -> None:
        while not self._closing.wait(FLUSH_INTERVAL_S):
            self._write()
        self._write()

    def _write(self) -> None:
        """One frame of what was added until now."""
        count = len(self._pending)
        if count > MAX_PENDING:
            self._give_up("the disk is too slow")
        elif count and not self._is_broken:
            try:
                data = encode_frame(self._encoded(count))
            except Exception as error:  # or this thread would end, and what waits for it grow for ever
                self._give_up(f"{type(error).__name__}: {error}")
                return
            self._write_out(len(data).to_bytes(4, "little") + crc32(data).to_bytes(4, "little") + data)

    def _write_out(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:  # a full disk is no reason to end the core
            self._give_up(str(error))

    def _encoded(self, count: int) -> list[bytes]:
        """The `count` oldest entries; now and then the step loop gets a chance to take the interpreter."""
        entries = []
        for index in range(count):
            pending = self._pending.popleft()
            if not isinstance(pending, tuple):
                entry: Entry = pending
            elif len(pending) == 2:
                entry = self._plans.entry(*pending)
            else:
                entry = settled_entry(self._id_type, *pending)
            entries.append(encode(entry))
            if index % _YIELD_EVERY == 0:
                time.sleep(0)
        return entries

    def _give_up(self, reason: str) -> None:
        log.error("the recording %s ends here: %s", self.path, reason)
        self._is_broken = True
        self._pending.clear()


def read_entries(path: Path) -> Iterator[Entry]:
    """The entries of a recording, its header first; a last frame that was cut off is left out.

    Raises ConfigError for what is no recording, or one of another version.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    with file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ConfigError(f"{path} is no recording that this version can read")
        while head := file.read(FRAME_HEAD_BYTES):
            length, checksum = int.from_bytes(head[:4], "little"), int.from_bytes(head[4:], "little")
            data = file.read(length)
            if len(head) < FRAME_HEAD_BYTES or len(data) < length:
                return
            if crc32(data) != checksum:
                raise ConfigError(f"{path} is damaged {file.tell() - length} bytes after its beginning")
            try:
                yield from decode_frame(data)
            except msgspec.DecodeError as error:
                raise ConfigError(f"{path} cannot be read: {error}") from None
