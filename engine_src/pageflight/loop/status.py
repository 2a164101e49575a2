"""The supervisor's word on its core, as a small file: how a front in another process learns why it has to wait."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

from pageflight.core.errors import PageflightError
from pageflight.loop.address import process_exists
from pageflight.loop.frames import error_from_wire

State = Literal["starting", "ready", "restarting", "lost", "closed"]


class CoreStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`starting` until the first core is ready, `restarting` until a later one is, `lost` when no more are tried, or
    ranks on other machines have not come in time for those who wait."""

    state: State
    supervisor_pid: int
    core_pid: int = 0
    restarts: int = 0
    shrinks: int = 0  # of the restarts, those with a smaller cache: the device had run out of memory
    num_blocks: int = 0  # of the cache, once the first core is ready
    progress: str = ""
    error: str = ""  # class name of the error that ended the last core, or kept it from starting
    message: str = ""

    @property
    def is_current(self) -> bool:
        """Whether the supervisor that said so lives."""
        return process_exists(self.supervisor_pid)

    @property
    def failure(self) -> PageflightError | None:
        return error_from_wire(self.error, self.message) if self.error else None


def write_status(path: Path, status: CoreStatus) -> None:
    """Replace the file at once, so that a reader sees the old word or the new one."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_bytes(msgspec.json.encode(status))
    os.replace(beside, path)


def read_status(path: Path) -> CoreStatus | None:
    """None while there is no supervisor (yet, or any more)."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=CoreStatus)
    except (FileNotFoundError, NotADirectoryError):
        return None
