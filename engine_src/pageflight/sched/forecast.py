"""How many blocks the running sequences will come to need, from how long answers were of late.

A sequence that is started too early is preempted later, and what it computed is computed or copied again. One that
waits for room that nobody will use leaves the engine half empty. So the peak of what is held is looked for over the
times at which the running sequences are expected to end: what ends earlier frees its blocks for what goes on (Gong et
al., Past-Future Scheduler for LLM Serving under SLA Guarantees, ASPLOS 2025).

Shapes: R sequences, those that run and the one that might start; H answers remembered.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

REMEMBERED = 256
GOLDEN = (math.sqrt(5) - 1) / 2
"""Parts behind the point of its multiples fill the interval from 0 to 1 evenly, however many there are."""

FloatArray = NDArray[np.float64]


class Forecast:
    """Answers that ended, as a distribution of their lengths.

    Every sequence is expected to be as long as one of them, a short one or a long one by its serial number. Were all
    expected to be as long as the mean, they would seem to grow all at once and to end all at once, which needs far more
    room than they ever do.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._lengths = np.zeros(REMEMBERED)  # a ring
        self._num_learnt = 0
        self._sorted: FloatArray | None = None  # [H] of the lengths, made when they are asked for

    def learn(self, num_tokens: int) -> None:
        """A sequence has ended after so many output tokens, however it ended."""
        self._lengths[self._num_learnt % REMEMBERED] = num_tokens
        self._num_learnt += 1
        self._sorted = None

    def remaining(
        self, serials_R: NDArray[np.int64], done_R: NDArray[np.int64], limit_R: NDArray[np.int64]
    ) -> FloatArray:
        """Output tokens still to be expected of sequences that have `done_R` of at most `limit_R`.

        They end as the answers did that were longer than they already are; where none was, anywhere up to the limit.
        """
        lengths = self._sorted
        if lengths is None:
            lengths = self._sorted = np.sort(self._lengths[: self._num_learnt])
        left_R, share_R = limit_R - done_R, serials_R * GOLDEN % 1.0
        expected_R = share_R * left_R
        first_longer_R = np.searchsorted(lengths, done_R, side="right")
        num_longer_R = len(lengths) - first_longer_R
        known_R = num_longer_R > 0
        index_R = first_longer_R + (share_R * num_longer_R).astype(np.int64)
        expected_R[known_R] = lengths[index_R[known_R]] - done_R[known_R]
        np.minimum(expected_R, left_R, out=expected_R)
        return expected_R

    def peak_blocks(self, tokens_R: NDArray[np.int64], remaining_R: FloatArray) -> float:
        """The most blocks that sequences with `tokens_R` of their own hold together until all have ended.

        Each holds half a block more than its tokens fill, on the average.
        """
        order = np.argsort(-remaining_R, kind="stable")
        remaining_R, count_R = remaining_R[order], np.arange(1, len(order) + 1)
        held_R = np.cumsum(tokens_R[order]) + count_R * remaining_R  # just before each ends
        return float((held_R / self._block_size + 0.5 * count_R).max())
