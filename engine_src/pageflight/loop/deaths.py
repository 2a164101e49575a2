"""What is known of cores that died, and how much of it speaks against a sequence.

The supervisor writes down, before it starts the next core, how the last one ended and which sequences were in the step
under way. Each front counts that against its own (`Suspicion`). One with `SUSPECT_AT` points is run alone by the next
core, and one with `GUILTY_AT`, alone in the step that died, is given up. So three deaths of the core's own making give
a sequence up: two among others, the third alone. A core that somebody killed counts half, for the killer need not be
the sequence: it takes six without a token between, the last three alone. A kill for want of memory looks the same.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import msgspec

from pageflight.sched.trials import TRIAL_TOKENS

SUSPECT_AT = 3
GUILTY_AT = 6
FORGIVEN_AFTER = 256
"""So many tokens after a crash, half of what crashes say against a sequence is forgotten."""
LONGEST_TRIAL = 64
"""Tokens. Twice as many, and again twice, after each crash that a trial did not explain: all others stand still."""
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


class Suspicion:
    """What deaths of cores say against one open sequence, and what its tokens since then say for it.

    The next token takes back what kills said: they come from outside. Not what crashes said, or whatever strikes at
    every 32nd position would be innocent again each time; nor is a trial of two tokens fair to it. A trial therefore
    lasts for as many tokens as the sequence had between two crashes.
    """

    __slots__ = ("_num_crash_points", "_num_kill_points", "_num_tokens", "_spacing")

    def __init__(self) -> None:
        self._num_crash_points = self._num_kill_points = 0
        self._num_tokens = 0  # since the last crash, or since half was forgotten
        self._spacing = 0

    @property
    def points(self) -> int:
        return self._num_crash_points + self._num_kill_points

    @property
    def trial_tokens(self) -> int:
        """Tokens that the sequence must have alone in the next core; 0: none."""
        if self.points < SUSPECT_AT:
            return 0
        num_unexplained = max(0, self._num_crash_points // 2 - 2)
        return TRIAL_TOKENS + min(self._spacing, LONGEST_TRIAL << num_unexplained)

    @property
    def is_guilty(self) -> bool:
        """Provided that it was alone."""
        return self.points >= GUILTY_AT

    def blame(self, death: Death, handle: int) -> None:
        """Count a death; `handle` is the sequence's number in the core that died."""
        points = death.points(handle)
        if not death.of_itself:
            self._num_kill_points += points
        elif points:
            if self._num_crash_points:
                self._spacing = max(self._spacing, self._num_tokens)
            self._num_crash_points += points
            self._num_tokens = 0

    def produced(self, num_tokens: int) -> None:
        """The sequence got so many tokens."""
        self._num_kill_points = 0
        if not self._num_crash_points:
            return
        self._num_tokens += num_tokens
        if self._num_tokens >= FORGIVEN_AFTER:
            self._num_crash_points //= 2
            self._num_tokens = 0


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
