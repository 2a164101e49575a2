"""Time as the loop sees it: seconds of one monotonic clock, passed in so that tests can hold it still."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]

monotonic_clock: Clock = time.monotonic
"""CLOCK_MONOTONIC: comparable across the processes of one machine."""


class ManualClock:
    """A clock that moves only when told to."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Move forward; time never runs back."""
        assert seconds >= 0, f"seconds={seconds}"
        self.now_s += seconds
