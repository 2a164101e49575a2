"""Batches in which a row's company cannot be heard: passes that keep to the kernels which work on each row alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pageflight.core.errors import ConfigError
from pageflight.lowering import company
from pageflight.lowering.base import CompiledModel, StepInputs
from pageflight.lowering.passes import extend
from pageflight.lowering.wrapped import WrappedModel

LEAST_ROWS = (1, 64)
"""Rows that products may have at least, in the order in which they are tried: small products may split their sums."""


class PaddedModel(WrappedModel):
    """Fills up passes with tokens that nobody reads, until the engine computes every row as if it were alone.

    An attention kernel that has fewer rows than threads, and one token in each, splits every row's context between the
    threads and adds the parts as they come; one chunk of two tokens in the pass keeps it from that. Whether everything
    else is free of company is not believed but tried, by `allocate`.
    """

    def __init__(self, model: CompiledModel, *, name: str, max_num_tokens: int) -> None:
        """`name` is the engine's in errors; `max_num_tokens` the most that a step can have."""
        super().__init__(model, token_tile=model.token_tile, replay_rows=1)
        self._name, self._max_num_tokens = name, max_num_tokens
        self._least_rows = LEAST_ROWS[0]
        self._spare = np.zeros(0, np.int32)  # blocks that the tokens nobody reads are written to
        self._num_logits = 0

    def allocate(self, num_blocks: int, num_host_blocks: int = 0) -> None:
        """Create the blocks, then compare passes. Raises ConfigError where company is heard whatever is filled up."""
        num_spare = -(-max(LEAST_ROWS) // self.block_size)
        end = num_blocks + num_spare
        self._model.allocate(end + company.NUM_BLOCKS, num_host_blocks)
        self._spare = np.arange(num_blocks, end, dtype=np.int32)
        sizes = company.sizes_to_try(self._max_num_tokens, self.num_threads)
        difference: str | None = None
        for self._least_rows in LEAST_ROWS:
            trial = company.Company(self, range(end, end + company.NUM_BLOCKS))
            difference = trial.first_difference(sizes)
            if difference is None:
                self.replay_rows = self._max_num_tokens if trial.can_chain() else 1
                return
        raise ConfigError(
            f"deterministic=True: an engine with {self._name} and num_threads={self.num_threads} cannot be it here: "
            f"{difference}; try num_threads=1 or another dtype"
        )

    def start(self, inputs: StepInputs) -> None:
        self._num_logits = len(inputs.take_L)
        num_rows, num_tokens = len(inputs.past_lens_S), len(inputs.ids_T)
        missing = max(0, self._least_rows - num_tokens)
        if num_tokens == num_rows < self.num_threads:
            missing = max(2, missing)
        missing_logits = max(0, self._least_rows - self._num_logits) if self._num_logits else 0
        if missing or missing_logits:
            inputs = extend(inputs, missing, self._spare[: -(-missing // self.block_size)], missing_logits)
        self._model.start(inputs)

    def wait(self) -> NDArray[np.float32]:
        return self._model.wait()[: self._num_logits]
