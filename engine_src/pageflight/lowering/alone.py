"""Every row by itself: the plain way to results that depend on nothing beside it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pageflight.lowering.base import CompiledModel, StepInputs
from pageflight.lowering.passes import split

_ANY_NUMBER = 1 << 20


class AloneModel:
    """Runs a step as passes of one sequence and one block each, so every pass has the shape it has without company."""

    def __init__(self, model: CompiledModel) -> None:
        self.block_size, self.vocab_size = model.block_size, model.vocab_size
        self.kv_bytes_per_block, self.token_tile, self.replay_rows = model.kv_bytes_per_block, 1, _ANY_NUMBER
        self.num_threads = model.num_threads
        self._model = model
        self._inputs: StepInputs | None = None

    def allocate(self, num_blocks: int, num_host_blocks: int = 0) -> None:
        self._model.allocate(num_blocks, num_host_blocks)

    def start(self, inputs: StepInputs) -> None:
        self._inputs = inputs

    def wait(self) -> NDArray[np.float32]:
        assert self._inputs is not None, "start comes first"
        logits_LV = np.empty((len(self._inputs.take_L), self.vocab_size), np.float32)
        for piece, lines in split(self._inputs, self.block_size):
            self._model.start(piece)
            logits_LV[lines] = self._model.wait()
        return logits_LV

    def copy_blocks(self, sources: NDArray[np.int32], targets: NDArray[np.int32]) -> None:
        self._model.copy_blocks(sources, targets)

    def copy_out(self, blocks: NDArray[np.int32], slots: NDArray[np.int32]) -> None:
        self._model.copy_out(blocks, slots)

    def copy_in(self, slots: NDArray[np.int32], blocks: NDArray[np.int32]) -> None:
        self._model.copy_in(slots, blocks)

    def close(self) -> None:
        self._model.close()
