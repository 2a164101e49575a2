"""LocalRunner: one compiled model in this process."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pageflight.core.errors import ConfigError
from pageflight.core.plan import StepPlan, StepResult
from pageflight.lowering.base import CompiledModel
from pageflight.runners.base import RunnerLimits
from pageflight.runners.inputs import BatchRows
from pageflight.sampling.sampler import FloatArray, Int32Array, NonFiniteLogits, Sampler

_NO_IDS = np.zeros(0, np.int32)


class LocalRunner:
    """Runs plans on a CompiledModel whose K/V blocks it allocates. One step is in flight at a time.

    Between `submit` and `collect` the caller may plan the next step; the sampled ids become tokens of their rows in
    `collect`, before the next plan's differences are applied.
    """

    def __init__(self, model: CompiledModel, *, num_blocks: int, max_num_seqs: int, max_model_len: int) -> None:
        """Allocate `num_blocks` blocks. Raises ConfigError when a limit cannot work."""
        for name, value in (
            ("num_blocks", num_blocks),
            ("max_num_seqs", max_num_seqs),
            ("max_model_len", max_model_len),
        ):
            if value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1")
        self.limits = RunnerLimits(
            num_blocks=num_blocks,
            block_size=model.block_size,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            vocab_size=model.vocab_size,
            token_tile=model.token_tile,
        )
        self._model = model
        self._rows = BatchRows(max_num_seqs=max_num_seqs, max_model_len=max_model_len, block_size=model.block_size)
        self._sampler = Sampler(max_num_seqs=max_num_seqs, vocab_size=model.vocab_size)
        self._in_flight: StepPlan | None = None
        model.allocate(num_blocks)

    def submit(self, plan: StepPlan) -> None:
        """Apply the plan's differences and begin its forward pass; a plan without rows changes state only."""
        assert self._in_flight is None, "collect() comes before the next submit()"
        for row in plan.ended_rows:
            self._sampler.end(row)
        self._rows.apply(plan)
        for start in plan.starts:
            self._sampler.start(start)
        if plan.copy_sources is not None and plan.copy_targets is not None and plan.copy_sources.size:
            self._model.copy_blocks(plan.copy_sources, plan.copy_targets)
        if plan.rows.size:
            self._model.start(self._rows.prepare(plan))
        self._in_flight = plan

    def collect(self) -> StepResult:
        """Wait for the submitted plan, sample, and return the ids; rows whose logits are not finite are `broken`."""
        plan, self._in_flight = self._in_flight, None
        assert plan is not None, "submit() comes before collect()"
        if not plan.rows.size:
            return StepResult(plan.step, _NO_IDS)
        logits_LV = self._model.wait()
        rows_L = plan.rows[plan.samples]
        if not rows_L.size:
            return StepResult(plan.step, _NO_IDS)
        try:
            ids_L, log_probs_L = self._sample(logits_LV, rows_L)
        except NonFiniteLogits as error:
            return self._sample_around(np.isin(rows_L, error.rows), logits_LV, rows_L, plan.step)
        return StepResult(plan.step, ids_L, log_probs_L)

    def _sample(self, logits_LV: FloatArray, rows_L: Int32Array) -> tuple[Int32Array, FloatArray | None]:
        ids_L, log_probs_L = self._sampler.sample(logits_LV, rows_L, self._rows.tokens_RM, self._rows.num_tokens_R)
        self._rows.append(rows_L, ids_L)
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

    def close(self) -> None:
        self._model.close()
