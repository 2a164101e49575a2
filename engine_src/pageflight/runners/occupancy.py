"""How much of the time in which steps are under way each rank computes: the rest is what a pipeline's bubbles cost."""

from __future__ import annotations

WINDOW_S = 1.0
"""Seconds of steps under way over which shares are taken."""


class Occupancy:
    """Told when steps begin and end, and how long each of `num_ranks` has computed so far."""

    def __init__(self, num_ranks: int) -> None:
        self.idle_share = 0.0
        """Of all ranks together, in the last window: waiting for others, or for a plan."""
        self._busy_s = [0.0] * num_ranks
        self._span_s = 0.0  # in this window
        self._since_s: float | None = None  # steps are under way
        self._busy_before_s = 0.0  # of all ranks, when this window began

    def begin(self, now_s: float) -> None:
        """A step is submitted."""
        if self._since_s is None:
            self._since_s = now_s

    def computed(self, rank: int, busy_s: float) -> None:
        """`rank` has computed for so long since it started."""
        self._busy_s[rank] = busy_s

    def end(self, now_s: float, *, is_last: bool) -> bool:
        """A step is over, and no other one under way if it `is_last`. Whether a window is, too."""
        assert self._since_s is not None, "a step ends that did not begin"
        self._span_s += now_s - self._since_s
        self._since_s = None if is_last else now_s
        if self._span_s < WINDOW_S:
            return False
        busy_s = sum(self._busy_s)
        share = (busy_s - self._busy_before_s) / (len(self._busy_s) * self._span_s)
        self.idle_share = min(1.0, max(0.0, 1.0 - share))
        self._busy_before_s, self._span_s = busy_s, 0.0
        return True
