"""A compiled model inside another that runs its passes differently."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pageflight.lowering.base import CompiledModel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class WrappedModel:
    """What has nothing to do with passes is the inner model's own affair: its blocks, copies of them, its end."""

    def __init__(self, model: CompiledModel, *, token_tile: int, replay_rows: int) -> None:
        self.block_size, self.vocab_size = model.block_size, model.vocab_size
        self.kv_bytes_per_block, self.num_threads = model.kv_bytes_per_block, model.num_threads
        self.token_tile, self.replay_rows = token_tile, replay_rows
        self._model = model

    def allocate(self, num_blocks: int, num_host_blocks: int = 0) -> None:
        self._model.allocate(num_blocks, num_host_blocks)

    def copy_blocks(self, sources: NDArray[np.int32], targets: NDArray[np.int32]) -> None:
        self._model.copy_blocks(sources, targets)

    def copy_out(self, blocks: NDArray[np.int32], slots: NDArray[np.int32]) -> None:
        self._model.copy_out(blocks, slots)

    def copy_in(self, slots: NDArray[np.int32], blocks: NDArray[np.int32]) -> None:
        self._model.copy_in(slots, blocks)

    def close(self) -> None:
        self._model.close()
