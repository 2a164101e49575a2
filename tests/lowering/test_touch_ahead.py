"""Memory of K/V blocks is there before it is used, and not much more of it."""

from __future__ import annotations

import ctypes
import mmap
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from pageflight.lowering.touch_ahead import TouchAhead

BLOCK = 64 << 10
NUM_BLOCKS = 512
AHEAD = 4 << 20
PIECE = 2 << 20


def resident_bytes(array: NDArray[np.uint8]) -> int:
    """What the system has given of an array's memory."""
    begin = array.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    length = array.ctypes.data + array.nbytes - begin
    pages = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(begin), ctypes.c_size_t(length), pages) == 0
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def settled(arrays: list[NDArray[np.uint8]], least: int) -> list[int]:
    """Resident bytes of each, once all have `least` or ten seconds have passed."""
    end_s = time.monotonic() + 10
    while time.monotonic() < end_s and min(map(resident_bytes, arrays)) < least:
        time.sleep(0.01)
    return [resident_bytes(array) for array in arrays]


@pytest.fixture
def arrays() -> list[NDArray[np.uint8]]:
    # From the system itself: what an allocator has kept of other tests' memory is resident already.
    maps = [mmap.mmap(-1, NUM_BLOCKS * BLOCK) for _ in range(2)]
    return [np.frombuffer(memory, np.uint8).reshape(NUM_BLOCKS, BLOCK) for memory in maps]


def test_the_next_blocks_are_resident_and_the_rest_is_not(arrays: list[NDArray[np.uint8]]) -> None:
    """Sixteen streams that grew into new blocks together waited for a hundred milliseconds; a cache that was touched
    whole at the start took all the memory it might ever use."""
    touching = TouchAhead(arrays, ahead_bytes=2 * AHEAD)
    try:
        time.sleep(0.05)
        assert max(map(resident_bytes, arrays)) <= PIECE, "nothing is in use yet"
        touching.reach(-1)
        assert all(AHEAD <= size <= AHEAD + 2 * PIECE for size in settled(arrays, AHEAD))
        touching.reach(199)
        wanted = 200 * BLOCK + AHEAD * 3 // 4
        assert all(wanted <= size <= 200 * BLOCK + AHEAD + 2 * PIECE for size in settled(arrays, wanted))
        touching.reach(NUM_BLOCKS - 1)
        whole = NUM_BLOCKS * BLOCK - 2 * mmap.PAGESIZE  # pages at the ends may be shared with something else
        assert min(settled(arrays, whole)) >= whole
    finally:
        touching.close()


def test_what_blocks_hold_is_left_alone(arrays: list[NDArray[np.uint8]]) -> None:
    """It runs beside steps that write."""
    for number, array in enumerate(arrays):
        array[::7] = number + 1
    touching = TouchAhead(arrays, ahead_bytes=2 * AHEAD)
    touching.reach(NUM_BLOCKS - 1)
    settled(arrays, (NUM_BLOCKS - 1) * BLOCK)
    touching.close()
    for number, array in enumerate(arrays):
        assert (array[::7] == number + 1).all() and not array[1::7].any()


def test_closing_ends_the_thread_in_the_middle_of_its_work(arrays: list[NDArray[np.uint8]]) -> None:
    """Memory that is freed under it would be somebody else's by then."""
    touching = TouchAhead(arrays, ahead_bytes=2 * NUM_BLOCKS * BLOCK)
    touching.close()
    assert touching.is_done


def test_arrays_smaller_than_a_page_are_no_work() -> None:
    """A tiny model's block is; and without arrays there is no thread at all."""
    touching = TouchAhead([np.zeros((1, 16), np.uint8)])
    touching.reach(0)
    touching.close()
    assert touching.is_done
    TouchAhead(()).close()
