"""A model in this process and the rows that it runs: what a plan changes, and ids sampled from logits."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pageflight.core.plan import StepPlan, StepResult
from pageflight.runners.inputs import BatchRows
from pageflight.sampling.sampler import FloatArray, Int32Array, NonFiniteLogits, Sampler

_NO_IDS = np.zeros(0, np.int32)


class BlockCopies(Protocol):
    """What a model does with whole blocks (see `lowering.base.CompiledModel`)."""

    def copy_blocks(self, sources: Int32Array, targets: Int32Array) -> None: ...
    def copy_out(self, blocks: Int32Array, slots: Int32Array) -> None: ...
    def copy_in(self, slots: Int32Array, blocks: Int32Array) -> None: ...


class HostBatch:
    """Rows and sampler, kept up by plans. `sampler` None: another process samples."""

    def __init__(self, model: BlockCopies, rows: BatchRows, sampler: Sampler | None) -> None:
        self.rows = rows
        self._model, self._sampler = model, sampler

    def apply(self, plan: StepPlan) -> None:
        """The plan's differences: rows, sampling parameters, block tables, copies of blocks."""
        if self._sampler is not None:
            for row in plan.ended_rows:
                self._sampler.end(row)
        self.rows.apply(plan)
        if self._sampler is not None:
            for start in plan.starts:
                self._sampler.start(start)
        if plan.copy_out_blocks is not None and plan.copy_out_slots is not None:
            self._model.copy_out(plan.copy_out_blocks, plan.copy_out_slots)
        if plan.copy_in_slots is not None and plan.copy_in_blocks is not None:
            self._model.copy_in(plan.copy_in_slots, plan.copy_in_blocks)
        if plan.copy_sources is not None and plan.copy_targets is not None and plan.copy_sources.size:
            self._model.copy_blocks(plan.copy_sources, plan.copy_targets)

    def sample(self, plan: StepPlan, logits_LV: FloatArray) -> StepResult:
        """Ids of the rows that sample, which become their tokens; rows whose logits are not finite are `broken`."""
        rows_L = plan.rows[plan.samples]
        if not rows_L.size:
            return StepResult(plan.step, _NO_IDS)
        try:
            ids_L, log_probs_L = self._sample(logits_LV, rows_L)
        except NonFiniteLogits as error:
            return self._sample_around(np.isin(rows_L, error.rows), logits_LV, rows_L, plan.step)
        return StepResult(plan.step, ids_L, log_probs_L)

    def _sample(self, logits_LV: FloatArray, rows_L: Int32Array) -> tuple[Int32Array, FloatArray | None]:
        assert self._sampler is not None, "somebody else samples"
        ids_L, log_probs_L = self._sampler.sample(logits_LV, rows_L, self.rows.tokens_RM, self.rows.num_tokens_R)
        self.rows.append(rows_L, ids_L)
        return ids_L, log_probs_L

    def _sample_around(
        self, broken_L: NDArray[np.bool_], logits_LV: FloatArray, rows_L: Int32Array, step: int
    ) -> StepResult:
        """The step's result where some rows cannot be sampled: the others must not suffer for it."""
        ids_L, log_probs_L, sound_L = np.zeros(rows_L.size, np.int32), None, ~broken_L
        if sound_L.any():
            ids_L[sound_L], log_probs = self._sample(logits_LV[sound_L], rows_L[sound_L])
            if log_probs is not None:
                log_probs_L = np.full(rows_L.size, np.nan, np.float32)
                log_probs_L[sound_L] = log_probs
        return StepResult(step, ids_L, log_probs_L, broken_L)
