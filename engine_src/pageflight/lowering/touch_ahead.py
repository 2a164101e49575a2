"""Memory of K/V blocks that the system gives before a step asks for it.

A system gives memory when it is first written, two mebibytes at a time where it can. That takes up to milliseconds in a
virtual machine, in every layer at once, and all streams wait. Giving everything at the start would take as much of the
machine as the cache may grow to; so a thread of its own stays a little ahead of the blocks in use.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

AHEAD_BYTES = 256 << 20
AHEAD_BLOCKS = 256
IDLE_SHARE = 0.75
"""Of the thread's time, so that it takes little of the cores from the steps beside it."""
_PIECE = 2 << 20  # a huge page
_POPULATE_WRITE = 23  # madvise's MADV_POPULATE_WRITE, Linux 5.14


class TouchAhead:
    """Keeps the next `ahead_bytes` of blocks resident, or `AHEAD_BLOCKS`, once the first one is in use.

    `arrays` are [num_blocks, bytes of a block], used from 0 up. What the blocks hold is not changed, so steps may run
    meanwhile. Where the kernel is too old, nothing happens.
    """

    def __init__(self, arrays: Sequence[NDArray[np.uint8]], ahead_bytes: int = AHEAD_BYTES) -> None:
        self._arrays = [array for array in arrays if array.size]
        self._num_blocks = len(self._arrays[0]) if self._arrays else 0
        bytes_per_block = sum(array.shape[1] for array in self._arrays)
        self._num_ahead = min(AHEAD_BLOCKS, max(1, ahead_bytes // bytes_per_block)) if bytes_per_block else 0
        self._target = 0  # blocks that are to be resident
        self._changed = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="touch-ahead", daemon=True)
        if self._arrays:
            self._thread.start()

    def reach(self, block: int) -> None:
        """`block` is in use. Costs next to nothing while the blocks ahead of it are resident."""
        # A quarter at a time: the thread is woken seldom.
        if self._target < self._num_blocks and block + 1 + self._num_ahead >= self._target + self._num_ahead // 4:
            self._target = min(self._num_blocks, block + 1 + self._num_ahead)
            self._changed.set()

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do, for good."""
        return not self._thread.is_alive()

    def close(self) -> None:
        """End the thread; the arrays may be freed after it."""
        self._closing.set()
        self._changed.set()
        if self._thread.is_alive():
            self._thread.join()
        self._arrays.clear()

    def _run(self) -> None:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        spans = [_Span(array) for array in self._arrays]
        while not self._closing.is_set() and any(not span.is_done for span in spans):
            self._changed.wait()
            self._changed.clear()
            while behind := [span for span in spans if span.is_behind(self._target)]:
                for span in behind:  # in turns: a block needs its part of every array
                    begin_s = time.perf_counter()
                    if madvise(*span.next_piece(), _POPULATE_WRITE) != 0:
                        return
                    busy_s = time.perf_counter() - begin_s
                    if self._closing.wait(busy_s * IDLE_SHARE / (1 - IDLE_SHARE)):
                        return


class _Span:
    """How far one array is resident. Only whole pages of its own are touched."""

    def __init__(self, array: NDArray[Any]) -> None:
        begin: int = array.ctypes.data
        self._begin, self._block_bytes = begin, int(array.shape[1])
        self._at = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        self._end = (begin + int(array.nbytes)) // mmap.PAGESIZE * mmap.PAGESIZE

    @property
    def is_done(self) -> bool:
        return self._at >= self._end

    def is_behind(self, num_blocks: int) -> bool:
        return self._at < min(self._end, self._begin + num_blocks * self._block_bytes)

    def next_piece(self) -> tuple[int, int]:
        """Address and length up to the next border of a huge page, at most to the end."""
        at = self._at
        self._at = min(self._end, (at // _PIECE + 1) * _PIECE)
        return at, self._at - at
