"""One generated answer on its way through the core: what happened to it so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pageflight.core.request import Request
    from pageflight.sched.tenants import Tenant


class State(Enum):
    """Where a sequence is; it is in exactly one of these places."""

    FORKING = "forking"  # one of n > 1: follows its leader, whose prompt it will share
    WAITING = "waiting"  # in the queue, holds nothing
    HELD = "held"  # beside the queue, holds nothing: waits for its turn to run alone
    PARKED = "parked"  # beside the queue, holds nothing: a block it needs is being computed by another
    PREFILL = "prefill"  # holds a row and blocks, computes its known tokens
    DECODE = "decode"  # holds a row and blocks, one token a step
    ENDED = "ended"  # its final event has been made


class Swapped(NamedTuple):
    """What a sequence without a row has on the host: the content of its first blocks."""

    slots: list[int]
    num_tokens: int  # computed, in these slots
    num_known: int  # of the slots, the first whose digest is known: they may be shared


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable state of one sequence, owned by the scheduler. While it holds a row, its tokens and blocks are there."""

    request: Request
    handle: int
    sequence_index: int
    tenant: Tenant
    rank: tuple[float, int]  # smaller goes first within its tenant, or among all (`Order`); the second part is unique
    tokens: NDArray[np.int32]  # [known] prompt and output, as of when it last held no row
    state: State = State.WAITING
    row: int = -1
    num_computed: int = 0  # planned so far; kept only in PREFILL, a decoding row has computed all but its last token
    digests: list[bytes] = field(default_factory=list)  # of its full blocks, as far as they were needed
    num_registered: int = 0  # of its blocks, those that the prefix cache has seen
    followers: list[Sequence] = field(default_factory=list)  # FORKING siblings that wait for this one's prompt
    leader: Sequence | None = None  # only in FORKING
    awaited: bytes | None = None  # digest of the block, only in PARKED
    first_scheduled_s: float = 0.0
    was_scheduled: bool = False
    is_preempted: bool = False  # waits, and had a row before
    swapped: Swapped | None = None
    num_computed_before: int = 0  # tokens computed when it was preempted
    num_shared: int = 0  # of the blocks it holds, those found computed when it took its row
    num_cached_tokens: int = 0
    num_reused_blocks: int = 0
    num_new_blocks: int = 0
    num_prompt: int = field(init=False)
    max_len: int = field(init=False)  # of prompt and output, at which `max_tokens` ends the sequence

    def __post_init__(self) -> None:
        self.num_prompt = len(self.request.prompt_ids)  # both asked for too often to be derived each time
        self.max_len = self.num_prompt + self.request.sampling.max_tokens
