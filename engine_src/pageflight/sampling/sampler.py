"""Sampler: the sampling state of every row, and the ids of a step.

L rows that sample, V vocabulary, R rows in all, M greatest length of a sequence.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pageflight.core.plan import RowStart
from pageflight.core.request import SamplingParams
from pageflight.sampling.adjustments import RowAdjustments
from pageflight.sampling.filters import candidates
from pageflight.sampling.philox import uniforms

Int32Array = NDArray[np.int32]
FloatArray = NDArray[np.float32]


class NonFiniteLogits(ArithmeticError):
    """A model gave NaN, +inf or nothing but -inf: no token can be chosen. `rows` are the rows concerned."""

    def __init__(self, rows: tuple[int, ...]) -> None:
        super().__init__(f"the model's logits are not finite in rows {list(rows)}")
        self.rows = rows


class Sampler:
    """Chooses the next id of rows, each by its own SamplingParams and by nothing else in the batch.

    The random number of a token depends on (seed, sequence index, position of the token in prompt + output) alone, and
    a row's arithmetic on its own logits alone: the same logits give the same id in any row, batch, step or process.
    """

    def __init__(self, *, max_num_seqs: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._lines = np.arange(max_num_seqs)
        self._plain = np.ones(max_num_seqs, np.bool_)  # greedy, nothing adjusted, no log probabilities
        self._num_special = 0  # rows that are not plain
        self._greedy = np.ones(max_num_seqs, np.bool_)
        self._log_probs = np.zeros(max_num_seqs, np.bool_)
        self._seeds = np.zeros(max_num_seqs, np.uint64)
        self._sequence_indices = np.zeros(max_num_seqs, np.uint64)
        self._num_prompt = np.zeros(max_num_seqs, np.int64)
        self._params: list[SamplingParams] = [SamplingParams()] * max_num_seqs
        self._adjustments: list[RowAdjustments | None] = [None] * max_num_seqs

    def start(self, start: RowStart) -> None:
        """Take over a row; a resumed sequence brings its output in `token_ids`, so penalties and counts go on."""
        row, sampling = start.row, start.sampling
        self.end(row)
        needed = RowAdjustments.needed(sampling)
        self._params[row] = sampling
        self._adjustments[row] = (
            RowAdjustments(sampling, start.token_ids, start.num_prompt, self._vocab_size) if needed else None
        )
        self._greedy[row] = np.float32(sampling.temperature) <= 0.0 or sampling.top_k == 1
        self._log_probs[row] = sampling.log_probs
        self._plain[row] = self._greedy[row] and not needed and not sampling.log_probs
        self._num_special += not self._plain[row]
        self._seeds[row] = np.uint64(sampling.seed & 0xFFFF_FFFF_FFFF_FFFF)
        self._sequence_indices[row] = start.sequence_index
        self._num_prompt[row] = start.num_prompt

    def end(self, row: int) -> None:
        """Forget what a row held."""
        self._params[row] = SamplingParams()
        self._adjustments[row] = None
        self._num_special -= not self._plain[row]
        self._greedy[row] = self._plain[row] = True
        self._log_probs[row] = False

    def sample(
        self, logits_LV: FloatArray, rows_L: Int32Array, tokens_RM: Int32Array, num_tokens_R: Int32Array
    ) -> tuple[Int32Array, FloatArray | None]:
        """The next id of each row, int32 [L]; and natural log probabilities [L] if a row of these asked for them.

        `tokens_RM[row, : num_tokens_R[row]]` are the row's prompt and output so far. `logits_LV` is only read. Log
        probabilities are those of the model's own distribution, before bias, masks, penalties and temperature; NaN for
        rows that did not ask. Raises NonFiniteLogits before any row's state has changed.
        """
        assert logits_LV.shape == (rows_L.size, self._vocab_size), "one line of logits for every row that samples"
        ids_L = logits_LV.argmax(axis=1)
        peaks_L = logits_LV[self._lines[: rows_L.size], ids_L]  # argmax finds a NaN wherever it is
        if not np.isfinite(peaks_L).all():
            raise NonFiniteLogits(tuple(rows_L[~np.isfinite(peaks_L)].tolist()))
        if not self._num_special:
            return ids_L.astype(np.int32), None
        special = np.flatnonzero(~self._plain[rows_L])
        self._choose(special, ids_L, peaks_L, logits_LV, rows_L, tokens_RM, num_tokens_R)
        log_probs_L = self._log_probs_of(ids_L, peaks_L, logits_LV, rows_L)
        for index in special.tolist():
            adjustments = self._adjustments[rows_L[index]]
            if adjustments is not None:
                adjustments.append(int(ids_L[index]))
        return ids_L.astype(np.int32), log_probs_L

    def _choose(
        self,
        special: NDArray[np.int64],
        ids_L: NDArray[np.int64],
        peaks_L: FloatArray,
        logits_LV: FloatArray,
        rows_L: Int32Array,
        tokens_RM: Int32Array,
        num_tokens_R: Int32Array,
    ) -> None:
        rows = rows_L[special]
        positions = num_tokens_R[rows].astype(np.uint64)
        randoms = uniforms(self._seeds[rows], self._sequence_indices[rows], positions).tolist()
        for index, row, uniform in zip(special.tolist(), rows.tolist(), randoms, strict=True):
            scores_V, peak = logits_LV[index], float(peaks_L[index])
            adjustments = self._adjustments[row]
            if adjustments is not None:
                num_tokens = int(num_tokens_R[row])
                num_output = num_tokens - int(self._num_prompt[row])
                scores_V = adjustments.apply(scores_V, tokens_RM[row, :num_tokens], num_output)
                ids_L[index] = scores_V.argmax()
                peak = float(scores_V[ids_L[index]])
            if not self._greedy[row]:
                params = self._params[row]
                ids_L[index] = candidates(
                    scores_V,
                    peak,
                    temperature=params.temperature,
                    top_k=params.top_k,
                    top_p=params.top_p,
                    min_p=params.min_p,
                ).draw(uniform)

    def _log_probs_of(
        self, ids_L: NDArray[np.int64], peaks_L: FloatArray, logits_LV: FloatArray, rows_L: Int32Array
    ) -> FloatArray | None:
        asked = np.flatnonzero(self._log_probs[rows_L])
        if not asked.size:
            return None
        log_probs_L = np.full(rows_L.size, np.nan, np.float32)
        for index in asked.tolist():
            logits_V = logits_LV[index] - peaks_L[index]
            chosen = float(logits_V[ids_L[index]])
            log_probs_L[index] = chosen - np.log(np.exp(logits_V, out=logits_V).sum(dtype=np.float64))
        return log_probs_L
