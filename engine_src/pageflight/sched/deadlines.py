"""Which open sequences run out of time, without looking at the others."""

from __future__ import annotations

import heapq

from pageflight.sched.sequence import Sequence, State

_COMPACT_AT = 256


class Deadlines:
    """A heap of deadlines; entries of sequences that ended earlier are dropped when met, or when it has doubled."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []
        self._compact_at = _COMPACT_AT

    def add(self, sequence: Sequence) -> None:
        """Watch `sequence` if its request has a deadline."""
        deadline_s = sequence.request.deadline_s
        if deadline_s is None:
            return
        heapq.heappush(self._heap, (deadline_s, sequence.rank[1], sequence))
        if len(self._heap) >= self._compact_at:
            self._heap = [item for item in self._heap if item[2].state is not State.ENDED]
            heapq.heapify(self._heap)
            self._compact_at = max(_COMPACT_AT, 2 * len(self._heap))

    @property
    def next_s(self) -> float | None:
        """The earliest deadline of an open sequence, or None."""
        heap = self._heap
        while heap and heap[0][2].state is State.ENDED:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def pop_expired(self, now_s: float) -> Sequence | None:
        """The next open sequence whose deadline is not after `now_s`, removed; None when there is none."""
        next_s = self.next_s
        if next_s is None or next_s > now_s:
            return None
        return heapq.heappop(self._heap)[2]
