"""A step as data: what runs (`StepPlan`), what came of it (`StepResult`, `StepEvents`).

Shapes: S rows that run in this step, L rows of them that sample, U block-table updates, C block copies, O and I copies
of blocks out to the host and in from it.
A *row* is a persistent place in the batch, held by a sequence from admission to its end or preemption. Arrays are
numpy, int32 unless stated. A plan is self-contained given the plans before it: a runner mirrors the rows and applies
each plan's differences, so plans can be sent to workers, recorded and replayed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pageflight.core.request import SamplingParams

    Int32Array = NDArray[np.int32]
    Int64Array = NDArray[np.int64]
    BoolArray = NDArray[np.bool_]
    FloatArray = NDArray[np.float32]


class Chunk(NamedTuple):
    """A token range of one row in one step; the readable view of a plan's arrays."""

    row: int
    start: int
    length: int
    samples: bool


@dataclass(frozen=True, slots=True)
class RowStart:
    """A sequence takes a row: new, or resumed after preemption (then `token_ids` holds its output too)."""

    row: int
    handle: int
    sequence_index: int
    token_ids: Int32Array
    num_prompt: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """Who runs which token range, and what changes in rows and block tables before it runs.

    Order of application: `ended_rows`, `starts`, table updates, copies out, copies in, copies between blocks, then the
    forward pass over `rows`. Copies read what was there before the step, or what a copy earlier in this order wrote.
    A row that runs `length` tokens from `start` uses its tokens [start, start + length); those with `samples` set reach
    the row's last known token, and the sampled id becomes the row's next token.
    """

    step: int
    rows: Int32Array  # [S]
    starts_at: Int32Array  # [S] first position
    lengths: Int32Array  # [S] tokens, >= 1
    samples: BoolArray  # [S]
    starts: tuple[RowStart, ...] = ()
    ended_rows: tuple[int, ...] = ()
    table_rows: Int32Array | None = None  # [U] tables[table_rows, table_columns] = table_blocks
    table_columns: Int32Array | None = None  # [U]
    table_blocks: Int32Array | None = None  # [U]
    copy_sources: Int32Array | None = None  # [C] blocks copied whole, before the pass
    copy_targets: Int32Array | None = None  # [C]
    copy_out_blocks: Int32Array | None = None  # [O] blocks copied whole to slots of the host tier
    copy_out_slots: Int32Array | None = None  # [O]
    copy_in_slots: Int32Array | None = None  # [I] slots copied whole to blocks
    copy_in_blocks: Int32Array | None = None  # [I]

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """The plan as readable records, for printing and tests."""
        columns = (self.rows.tolist(), self.starts_at.tolist(), self.lengths.tolist(), self.samples.tolist())
        return tuple(Chunk(*item) for item in zip(*columns, strict=True))

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """Ids sampled by the rows with `samples` set, in the plan's order; log probabilities where any row asked."""

    step: int
    sampled_ids: Int32Array  # [L]
    log_probs: FloatArray | None = None  # [L] natural log of the probability of each sampled id (before temperature)
    broken: BoolArray | None = None  # [L] rows whose logits were not finite: no id, the sequence ends with an error


@dataclass(frozen=True, slots=True)
class Finished:
    """The one final event of a sequence. `reason`: stop, length, cancelled, deadline or error."""

    handle: int
    reason: str
    num_prompt_tokens: int
    num_output_tokens: int
    first_scheduled_s: float = 0.0
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    num_reused_blocks: int = 0
    num_new_blocks: int = 0
    message: str = ""  # for reason `error`


@dataclass(frozen=True, slots=True, eq=False)
class StepEvents:
    """What a settled step means for the sequences: new tokens by handle, and endings. Ids come before endings."""

    step: int
    handles: Int64Array  # [L]
    ids: Int32Array  # [L]
    log_probs: FloatArray | None  # [L]
    finished: tuple[Finished, ...]
