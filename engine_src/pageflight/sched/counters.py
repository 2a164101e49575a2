"""What the scheduler has counted since it was made."""

from __future__ import annotations

from dataclasses import dataclass, field

from pageflight.core.errors import Draining, InvalidArgument, PageflightError, PromptTooLong, QueueFull
from pageflight.kv.host_tier import HostCopies
from pageflight.sched.costs import Costs
from pageflight.sched.kv_space import Claim
from pageflight.sched.sequence import Sequence

_REFUSAL_NAMES: tuple[tuple[type[PageflightError], str], ...] = (
    (PromptTooLong, "prompt_too_long"),
    (InvalidArgument, "invalid_argument"),
    (QueueFull, "queue_full"),
    (Draining, "draining"),
)


@dataclass(slots=True)
class Counters:
    """Numbers of `CoreStats` that cannot be derived from the scheduler's state."""

    num_preempted: int = 0  # gauge: waiting now, had a row before
    steps: int = 0
    last_step_context_tokens: int = 0
    last_step_generation_rows: int = 0
    prompt_tokens: int = 0  # of sequences when first admitted; forked followers bring none
    cached_tokens: int = 0  # of those, found in the prefix cache
    host_cached_tokens: int = 0  # of those, found in its second level
    saved_s: float = 0.0  # what computing them would have taken, less the copies
    generated_tokens: int = 0
    recomputed_tokens: int = 0  # computed again after a preemption, or after a restart of the core
    reused_blocks: int = 0
    preemptions: int = 0
    swaps_out: int = 0  # of the preemptions, those that took their blocks to the host
    swaps_in: int = 0
    blocks_copied_out: int = 0
    blocks_copied_in: int = 0
    cancellations: int = 0
    refusals: dict[str, int] = field(default_factory=dict)

    def refuse(self, error: PageflightError) -> None:
        name = next((name for kind, name in _REFUSAL_NAMES if isinstance(error, kind)), "other")
        self.refusals[name] = self.refusals.get(name, 0) + 1

    def admit(self, sequence: Sequence, claim: Claim, costs: Costs) -> None:
        """`sequence` leaves the queue with these blocks."""
        if sequence.is_preempted:
            sequence.is_preempted = False
            self.num_preempted -= 1
            self.swaps_in += claim.was_swapped
            self.recomputed_tokens += max(0, sequence.num_computed_before - claim.num_computed)
            return
        num_cached = min(claim.num_computed, sequence.num_prompt)
        self.prompt_tokens += sequence.num_prompt
        self.cached_tokens += num_cached
        self.host_cached_tokens += min(claim.num_fetched * costs.block_size, num_cached)
        self.saved_s += costs.saved_s(num_cached, claim.num_fetched)
        if sequence.request.output_ids:
            self.recomputed_tokens += max(0, len(sequence.tokens) - 1 - claim.num_computed)

    def copied(self, copies: HostCopies) -> None:
        self.blocks_copied_out += len(copies.outs)
        self.blocks_copied_in += len(copies.ins)

    def planned(self, *, num_context_tokens: int, num_generation_rows: int) -> None:
        self.steps += 1
        self.last_step_context_tokens = num_context_tokens
        self.last_step_generation_rows = num_generation_rows
