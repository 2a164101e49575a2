"""Which sequences the core is working on, kept where it outlives the core: memory that its supervisor holds.

Writing it is a copy of one array, without a call to the kernel; what a process has stored is there after it was killed.
Layout, int64: epoch of the core · steps completed · rows in the step under way, 0 for none · handle being taken in,
-1 for none · handles of those rows. The count is set to 0 while the handles change, so it never counts half of them.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_EPOCH, _STEPS, _COUNT, _TAKEN, _HEAD = 0, 1, 2, 3, 4
_ITEM_BYTES = 8


class StepTrace:
    """The core's end."""

    def __init__(self, fd: int, epoch: int, num_rows: int) -> None:
        """`fd`: the supervisor's memory file; below 0 for a core without supervisor, whose trace nobody reads."""
        size = (_HEAD + num_rows) * _ITEM_BYTES
        if fd >= 0:
            os.ftruncate(fd, size)
        self._memory = mmap.mmap(fd if fd >= 0 else -1, size)
        self._handles: NDArray[np.int64] = np.frombuffer(self._memory, np.int64)[_HEAD:]
        self._head = memoryview(self._memory).cast("q")
        self._head[_COUNT], self._head[_TAKEN] = 0, -1
        self._head[_STEPS], self._head[_EPOCH] = 0, epoch

    def begin(self, handles_R: NDArray[np.int64], rows_S: NDArray[np.int32]) -> None:
        """A step of these rows goes to the runner."""
        count = len(rows_S)
        self._head[_COUNT] = 0
        handles_R.take(rows_S, out=self._handles[:count], mode="clip")  # other modes copy once more
        self._head[_COUNT] = count

    def end(self) -> None:
        """Its result was taken in."""
        self._head[_COUNT] = 0
        self._head[_STEPS] += 1

    def take(self, handle: int) -> None:
        """This sequence is being looked at: its request is taken in, or its step planned. A step may be under way."""
        self._head[_TAKEN] = handle

    def taken(self) -> None:
        self._head[_TAKEN] = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class LastWords:
    """What a dead core was doing. `handles`, in the core's own numbers, of those it was working on; none if it was
    between two steps."""

    epoch: int
    steps: int
    handles: tuple[int, ...]


def read_trace(fd: int) -> LastWords | None:
    """The trace in the supervisor's memory file; None if the core died before it began one."""
    numbers = np.frombuffer(os.pread(fd, os.fstat(fd).st_size, 0), np.int64).tolist()
    if len(numbers) < _HEAD or not numbers[_EPOCH]:
        return None
    taken, rows = numbers[_TAKEN], numbers[_HEAD : _HEAD + numbers[_COUNT]]
    handles = (*rows, taken) if taken >= 0 and taken not in rows else tuple(rows)
    return LastWords(epoch=numbers[_EPOCH], steps=numbers[_STEPS], handles=handles)
