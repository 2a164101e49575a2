"""What a lowering must offer: operations for the decoder definition, and a compiled model that runs steps.

Shapes: T packed tokens of a step, S sequences that run, N block indices of all of them, L rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from pageflight.models.ops import Ops

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pageflight.models.config import DecoderConfig

__all__ = ["AheadOfTime", "CompiledModel", "Lowering", "Ops", "StepInputs"]


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """One forward pass in flat arrays; sequences are packed one after another, prompt chunks and decode tokens alike.

    Block indices of sequence s are `block_indices_N[block_begins[s] : block_begins[s + 1]]`, enough blocks for
    `past_lens_S[s]` cached tokens plus the new ones. `take_L` picks the packed tokens whose logits are wanted.
    """

    ids_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    past_lens_S: NDArray[np.int32]
    token_begins: NDArray[np.int32]  # [S + 1]
    block_indices_N: NDArray[np.int32]
    block_begins: NDArray[np.int32]  # [S + 1]
    max_context_len: int
    take_L: NDArray[np.int64]


class CompiledModel(Protocol):
    """A loaded engine. One step is in flight at a time; `start` returns at once where the target allows it."""

    block_size: int
    vocab_size: int
    kv_bytes_per_block: int  # K and V of all layers
    token_tile: int  # tokens that its matrix products compute at a time; 1 where it makes no difference
    replay_rows: int  # consecutive tokens of a sequence that may be rows of one pass; known after `allocate`
    num_threads: int  # that compute a pass

    def allocate(self, num_blocks: int, num_host_blocks: int = 0) -> None:
        """Create the K/V blocks and their second level in host memory (once). Ids count from 0 in each."""

    def start(self, inputs: StepInputs) -> None:
        """Begin one forward pass. The arrays must not change until `wait` returned."""

    def wait(self) -> NDArray[np.float32]:
        """Logits [L, V] of the pass; valid until the next `start`. The interpreter lock is free while it waits."""

    def copy_blocks(self, sources: NDArray[np.int32], targets: NDArray[np.int32]) -> None:
        """Copy whole blocks in every layer, K and V."""

    def copy_out(self, blocks: NDArray[np.int32], slots: NDArray[np.int32]) -> None:
        """Copy whole blocks to slots of the host's. No slot is named twice."""

    def copy_in(self, slots: NDArray[np.int32], blocks: NDArray[np.int32]) -> None:
        """Copy whole slots of the host's to blocks. No block is named twice."""

    def close(self) -> None: ...


class Lowering(Protocol):
    """One target: knows its machine and loads engines built for it."""

    name: str
    block_size: int

    def fingerprint(self, dtype: str) -> dict[str, str]:
        """What an engine built here depends on (versions, CPU features or GPU).

        Raises ConfigError for a `dtype` that cannot run here.
        """

    def default_kv_dtype(self, dtype: str) -> str:
        """The kv dtype that a build of `dtype` takes unless told otherwise."""

    def check(self, config: DecoderConfig, dtype: str, kv_dtype: str, group_size: int = 0) -> None:
        """Raises CheckpointError for a model, ConfigError for a precision that cannot be built here."""

    def load(self, engine_dir: Path, *, num_threads: int) -> CompiledModel:
        """Load an engine directory. Raises ManifestMismatch with the reason when it was built for something else."""

    def deterministic(self, model: CompiledModel, *, name: str, max_num_tokens: int) -> CompiledModel:
        """A loaded `model`, not allocated yet, so that what a token gets does not depend on the rest of its pass.

        It must be computed by fixed borders (`sched.borders`). Raises ConfigError, here or when allocated, where that
        cannot be; `name` says of which engine. `max_num_tokens` is the most that a pass will have.
        """


@runtime_checkable
class AheadOfTime(Protocol):
    """What a lowering has besides, when its engines are compiled by the build for devices that need not be here."""

    def compile(
        self,
        engine_dir: Path,
        config: DecoderConfig,
        *,
        dtype: str,
        group_size: int,
        max_model_len: int,
        advance: Callable[[int, int], None],
    ) -> str:
        """Add to a directory with weights what is compiled from them; the line that sums it up.

        `advance` is called with (parts done, parts in all). Raises ConfigError for what cannot be compiled.
        """

    def missing_device(self) -> str:
        """Why engines cannot run here, where nothing can verify them either."""
