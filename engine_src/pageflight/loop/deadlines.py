"""Which open generations run out of time, as far as their front is concerned."""

from __future__ import annotations

import heapq
from collections.abc import Callable

_COMPACT_AT = 256


class Deadlines:
    """A heap of deadlines; those of generations that ended earlier are dropped when met, or when it has doubled.

    Times are seconds of the monotonic clock.
    """

    def __init__(self, is_open: Callable[[int], bool]) -> None:
        """`is_open`: whether the generation of this id still is."""
        self._is_open = is_open
        self._heap: list[tuple[float, int]] = []
        self._compact_at = _COMPACT_AT

    def add(self, deadline_s: float, generation_id: int) -> None:
        heapq.heappush(self._heap, (deadline_s, generation_id))
        if len(self._heap) >= self._compact_at:
            self._heap = [item for item in self._heap if self._is_open(item[1])]
            heapq.heapify(self._heap)
            self._compact_at = max(_COMPACT_AT, 2 * len(self._heap))

    def has_expired(self, now_s: float) -> bool:
        """Whether `pop_expired` has anything to look at."""
        return bool(self._heap) and self._heap[0][0] <= now_s

    def pop_expired(self, now_s: float) -> list[int]:
        """The open generations whose deadline is not after `now_s`, removed."""
        expired = []
        while self.has_expired(now_s):
            generation_id = heapq.heappop(self._heap)[1]
            if self._is_open(generation_id):
                expired.append(generation_id)
        return expired
