"""What a core tells its supervisor through a pipe, one JSON line each; and the one thing it is told."""

from __future__ import annotations

import os
import signal
from typing import Literal

import msgspec

Kind = Literal["progress", "ready", "beat", "failed"]

DRAIN_SIGNAL = signal.SIGUSR1
"""Asks a core to finish what is open and end. Not SIGTERM: whoever stops a whole control group sends that to the core
as well, while its server still takes requests."""


SHRUNK_TO = 0.9
"""Share of its blocks that a cache keeps when its device ran out of memory."""


class CacheSize(msgspec.Struct, frozen=True, kw_only=True):
    """What a core could take in: its successors must be able to as well. The host tier's size is a setting, never
    computed from free memory. A device that ran out of memory is the one reason to give them less."""

    num_blocks: int
    max_sequence_len: int
    block_size: int = 0

    def shrunk(self) -> CacheSize:
        """Less by `SHRUNK_TO`, and what still fits it."""
        num_blocks = max(1, int(self.num_blocks * SHRUNK_TO))
        longest = min(self.max_sequence_len, num_blocks * self.block_size + 1)
        return CacheSize(num_blocks=num_blocks, max_sequence_len=longest, block_size=self.block_size)


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """`progress` while it starts (`message` says with what), `ready` once with `cache`, `beat` while its loop turns,
    `failed` with the error's class name and message before it exits by itself."""

    kind: Kind
    message: str = ""
    error: str = ""
    cache: CacheSize | None = None
    of_itself: bool = True
    """False: it failed because somebody killed a process that it cannot do without."""


class Reporter:
    """The core's end of the pipe. Without a pipe (`fd` < 0) it is silent: a core started by hand has no supervisor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        if fd >= 0:
            os.set_inheritable(fd, False)  # workers of the core must not keep the pipe open when it dies
            os.set_blocking(fd, False)  # nor may a supervisor that does not read stop the core

    def send(self, report: Report) -> None:
        if self._fd < 0:
            return
        try:
            os.write(self._fd, msgspec.json.encode(report) + b"\n")
        except BlockingIOError:
            return  # thousands of reports wait already
        except BrokenPipeError:
            self._fd = -1  # the supervisor is gone; the core is about to be killed with it


def parse_reports(buffer: bytearray) -> list[Report]:
    """Take the whole lines out of `buffer`."""
    end = buffer.rfind(b"\n") + 1
    lines = bytes(buffer[:end]).splitlines()
    del buffer[:end]
    return [msgspec.json.decode(line, type=Report) for line in lines]
