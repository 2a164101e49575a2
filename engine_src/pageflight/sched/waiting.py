"""Sequences without a row, best rank first; no operation looks at the others."""

from __future__ import annotations

import heapq

from pageflight.sched.sequence import Sequence, State

_COMPACT_AT = 64


class WaitingQueue:
    """A heap by rank. Those that ended while waiting stay in it until they reach the top or outnumber the others."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Sequence]] = []
        self._num_ended = 0

    def __len__(self) -> int:
        return len(self._heap) - self._num_ended

    def push(self, sequence: Sequence) -> None:
        assert sequence.state is State.WAITING
        heapq.heappush(self._heap, (sequence.rank, sequence))

    def peek(self) -> Sequence | None:
        """The sequence to be admitted next, or None."""
        heap = self._heap
        while heap and heap[0][1].state is not State.WAITING:
            heapq.heappop(heap)
            self._num_ended -= 1
        return heap[0][1] if heap else None

    def pop(self) -> Sequence:
        sequence = self.peek()
        assert sequence is not None, "nothing waits"
        heapq.heappop(self._heap)
        return sequence

    def forget(self, sequence: Sequence) -> None:
        """`sequence`, whose state the caller has set to ENDED, no longer counts."""
        assert sequence.state is State.ENDED
        self._num_ended += 1
        if self._num_ended > _COMPACT_AT and 2 * self._num_ended > len(self._heap):
            self._heap = [item for item in self._heap if item[1].state is State.WAITING]
            heapq.heapify(self._heap)
            self._num_ended = 0

    def check(self) -> None:
        waiting = [item[1] for item in self._heap if item[1].state is State.WAITING]
        assert len(waiting) == len(self), f"{len(waiting)} sequences wait, {len(self)} counted"
        assert len({sequence.handle for sequence in waiting}) == len(waiting), "a sequence waits twice"
