"""The open sequences of one front: by handle, by generation, and by when their time is over."""

from __future__ import annotations

import threading

from pageflight.core.errors import QueueFull
from pageflight.loop.deadlines import Deadlines
from pageflight.loop.frames import CoreLimits
from pageflight.loop.open_sequence import OpenSequence


class Handles:
    """Numbers of sequences, each given once: fronts that share them can hand sequences to each other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = 0

    def take(self, count: int) -> int:
        """The first of so many in a row."""
        with self._lock:
            first, self._next = self._next, self._next + count
        return first


class Book:
    """Changed under the front's lock."""

    def __init__(self) -> None:
        self.open: dict[int, OpenSequence] = {}
        self.groups: dict[int, list[OpenSequence]] = {}
        """What is open of each generation."""
        self._deadlines = Deadlines(self.groups.__contains__)

    def has_room(self, count: int, limits: CoreLimits) -> bool:
        """While no core answers, its front keeps the limit of its queue: whether so many more are within it."""
        return self._num_queued(limits) + count <= limits.max_queue_size

    def check_room(self, count: int, limits: CoreLimits) -> None:
        """Raises QueueFull where there is none."""
        if not self.has_room(count, limits):
            raise QueueFull(max(0, self._num_queued(limits)), limits.max_queue_size)

    def _num_queued(self, limits: CoreLimits) -> int:
        return len(self.open) - limits.max_num_seqs  # if all rows were taken

    def add(self, sequences: list[OpenSequence]) -> None:
        """The sequences of one generation, those that are open."""
        first = sequences[0]
        self.open.update((sequence.handle, sequence) for sequence in sequences)
        self.groups.setdefault(first.leader, []).extend(sequences)
        if first.deadline_s is not None:
            self._deadlines.add(first.deadline_s, first.leader)

    def remove(self, sequence: OpenSequence) -> bool:
        """False if it has been removed already."""
        if self.open.pop(sequence.handle, None) is None:
            return False
        group = self.groups[sequence.leader]
        group.remove(sequence)
        if not group:
            del self.groups[sequence.leader]
        return True

    def has_late(self, now_s: float) -> bool:
        """Whether `pop_late` has anything to look at."""
        return self._deadlines.has_expired(now_s)

    def pop_late(self, now_s: float) -> list[OpenSequence]:
        """Those whose deadline is not after `now_s`, told once."""
        return [sequence for leader in self._deadlines.pop_expired(now_s) for sequence in self.groups[leader]]
