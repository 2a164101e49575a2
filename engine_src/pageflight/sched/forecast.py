"""How many blocks the running sequences will come to need, from how long answers were of late.

A sequence that is started too early is preempted later, and what it computed is computed or copied again. One that
waits for room that nobody will use leaves the engine half empty. So the peak of what is held is looked for over the
times at which the running sequences are expected to end: what ends earlier frees its blocks for what goes on (Gong et
al., Past-Future Scheduler for LLM Serving under SLA Guarantees, ASPLOS 2025).

Shapes: R sequences, those that run and the one that might start; H answers remembered.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

REMEMBERED = 256
UNKNOWN_SHARE = 0.25
"""Of the tokens that a sequence may still bring, while no answer was longer than it already is."""

FloatArray = NDArray[np.float64]


class Forecast:
    """Answers that ended, as a distribution of their lengths."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._lengths = np.zeros(REMEMBERED)  # a ring
        self._num_learnt = 0
        self._sorted: FloatArray | None = None  # [H] of the lengths, made when they are asked for
        self._mean_from = self._lengths  # [H] mean of the sorted lengths from each on

    def learn(self, num_tokens: int) -> None:
        """A sequence has ended after so many output tokens, however it ended."""
        self._lengths[self._num_learnt % REMEMBERED] = num_tokens
        self._num_learnt += 1
        self._sorted = None

    def remaining(self, done_R: NDArray[np.int64], limit_R: NDArray[np.int64]) -> FloatArray:
        """Output tokens still to be expected of sequences that have `done_R` of at most `limit_R`.

        The mean of the answers that were longer than a sequence already is.
        """
        lengths = self._sorted
        if lengths is None:
            lengths = self._sorted = np.sort(self._lengths[: self._num_learnt])
            self._mean_from = np.cumsum(lengths[::-1])[::-1] / np.arange(len(lengths), 0, -1)
        left_R = limit_R - done_R
        expected_R = (UNKNOWN_SHARE * left_R).astype(np.float64)
        first_longer_R = np.searchsorted(lengths, done_R, side="right")
        known_R = first_longer_R < len(lengths)
        expected_R[known_R] = self._mean_from[first_longer_R[known_R]] - done_R[known_R]
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
