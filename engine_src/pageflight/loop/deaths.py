"""What is known of cores that died, and how much of it speaks against a sequence.

The supervisor writes down, before it starts the next core, how the last one ended and which sequences were in the step
under way. Each front counts that against its own. Points are taken back by the next token of the sequence; one with
`SUSPECT_AT` is run alone by the next core, and one with `GUILTY_AT`, alone in the step that died, is given up. So three
deaths of the core's own making give a sequence up: two among others, the third alone. A core that somebody killed
counts half, for the killer need not be the sequence: it takes six in a row, the last three alone.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import msgspec

SUSPECT_AT = 3
GUILTY_AT = 6
MAX_KEPT = 8
"""Deaths that the file keeps: a front that missed more of them has forgiven them."""

_CRASHES = frozenset(
    (
        signal.SIGABRT,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGSEGV,
        signal.SIGSYS,
        signal.SIGTRAP,
    )
)


class Death(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a core that had been ready. `handles`: of the sequences it was working on, in its own numbers."""

    epoch: int
    handles: tuple[int, ...]
    of_itself: bool
    """It crashed, gave up or hung. False: it was killed, or told to end."""

    def points(self, handle: int) -> int:
        """What this death says against the sequence, for one that was open."""
        if self.handles:
            return (2 if self.of_itself else 1) if handle in self.handles else 0
        return int(self.of_itself)  # between two steps: anybody's, or nobody's

    def proves_guilt(self, handle: int) -> bool:
        """Whether nobody else was in the step."""
        return self.handles == (handle,)


def is_crash(return_code: int) -> bool:
    """Whether a process with this return code of `subprocess` ended of itself."""
    return return_code > 0 or -return_code in _CRASHES


def write_deaths(path: Path, deaths: Sequence[Death]) -> None:
    """Replace the file at once."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_bytes(msgspec.json.encode(deaths))
    os.replace(beside, path)


def read_deaths(path: Path) -> dict[int, Death]:
    """By epoch; empty when no core has died."""
    try:
        deaths = msgspec.json.decode(path.read_bytes(), type=list[Death])
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {death.epoch: death for death in deaths}
