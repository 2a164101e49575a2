"""LocalRunner: one compiled model in this process."""

from __future__ import annotations

import statistics
import time

import numpy as np

from pageflight.core.errors import ConfigError
from pageflight.core.plan import StepPlan, StepResult
from pageflight.lowering.base import CompiledModel
from pageflight.runners.base import RunnerLimits
from pageflight.runners.host_batch import BlockCopies, HostBatch
from pageflight.runners.inputs import BatchRows
from pageflight.sampling.sampler import Sampler

COPIES_MEASURED = 16
COPY_ROUNDS = 6
_NO_IDS = np.zeros(0, np.int32)


class LocalRunner:
    """Runs plans on a CompiledModel whose K/V blocks it allocates. One step is in flight at a time.

    Between `submit` and `collect` the caller may plan the next step; the sampled ids become tokens of their rows in
    `collect`, before the next plan's differences are applied.
    """

    def __init__(
        self,
        model: CompiledModel,
        *,
        num_blocks: int,
        max_num_seqs: int,
        max_model_len: int,
        num_host_blocks: int = 0,
        deterministic: bool = False,
    ) -> None:
        """Allocate the blocks of both levels. Raises ConfigError when a limit, or `deterministic`, cannot work.

        `deterministic`: output tokens that are computed again are rows of one token each, as they were at first.
        """
        for name, value in (
            ("num_blocks", num_blocks),
            ("max_num_seqs", max_num_seqs),
            ("max_model_len", max_model_len),
        ):
            if value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1")
        model.allocate(num_blocks, num_host_blocks)
        self.limits = RunnerLimits(
            num_blocks=num_blocks,
            num_host_blocks=num_host_blocks,
            host_copy_s=measure_copies(model, min(num_blocks, num_host_blocks)),
            block_size=model.block_size,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            vocab_size=model.vocab_size,
            token_tile=model.token_tile,
            replay_rows=model.replay_rows,
        )
        self._model = model
        rows = BatchRows(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            block_size=model.block_size,
            splits_output=deterministic,
        )
        self._batch = HostBatch(model, rows, Sampler(max_num_seqs=max_num_seqs, vocab_size=model.vocab_size))
        self._in_flight: StepPlan | None = None

    def submit(self, plan: StepPlan) -> None:
        """Apply the plan's differences and begin its forward pass; a plan without rows changes state only."""
        assert self._in_flight is None, "collect() comes before the next submit()"
        self._batch.apply(plan)
        if plan.rows.size:
            self._model.start(self._batch.rows.prepare(plan))
        self._in_flight = plan

    def stage(self, plan: StepPlan) -> None:
        """Prepare the next plan while one runs, where rows only go on decoding."""
        if not (plan.starts or plan.ended_rows) and plan.copy_sources is None:
            self._batch.rows.stage(plan)

    def collect(self) -> StepResult:
        """Wait for the submitted plan, sample, and return the ids; rows whose logits are not finite are `broken`."""
        plan, self._in_flight = self._in_flight, None
        assert plan is not None, "submit() comes before collect()"
        if not plan.rows.size:
            return StepResult(plan.step, _NO_IDS)
        return self._batch.sample(plan, self._model.wait())

    def close(self) -> None:
        self._model.close()


def measure_copies(model: BlockCopies, num_blocks: int) -> float:
    """Seconds of copying one block to the host or back: of a few at once, as a swap copies them."""
    if not num_blocks:
        return 0.0
    ids = np.arange(min(num_blocks, COPIES_MEASURED), dtype=np.int32)
    times = []
    for _ in range(COPY_ROUNDS):
        begin_s = time.perf_counter()
        model.copy_out(ids, ids)
        model.copy_in(ids, ids)
        times.append(time.perf_counter() - begin_s)
    return statistics.median(times[1:]) / (2 * ids.size)  # the first one pays for pages never touched before
