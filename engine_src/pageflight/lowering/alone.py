"""Every row by itself: the plain way to results that depend on nothing beside it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pageflight.lowering.base import CompiledModel, StepInputs
from pageflight.lowering.passes import split
from pageflight.lowering.wrapped import WrappedModel

_ANY_NUMBER = 1 << 20


class AloneModel(WrappedModel):
    """Runs a step as passes of one sequence and one block each, so every pass has the shape it has without company."""

    def __init__(self, model: CompiledModel) -> None:
        super().__init__(model, token_tile=1, replay_rows=_ANY_NUMBER)
        self._inputs: StepInputs | None = None

    def start(self, inputs: StepInputs) -> None:
        self._inputs = inputs

    def wait(self) -> NDArray[np.float32]:
        assert self._inputs is not None, "start comes first"
        logits_LV = np.empty((len(self._inputs.take_L), self.vocab_size), np.float32)
        for piece, lines in split(self._inputs, self.block_size):
            self._model.start(piece)
            logits_LV[lines] = self._model.wait()
        return logits_LV
