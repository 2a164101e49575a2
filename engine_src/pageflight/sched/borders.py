"""Where the chunks of a sequence end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pageflight.sched.pacing import Budget


class Borders(Protocol):
    """How many tokens a chunk may have. `has_chunk`: the step has one already."""

    def is_spent(self, budget: Budget, *, has_chunk: bool) -> bool:
        """Whether `budget` has no further chunk."""

    def take(self, budget: Budget, start: int, num_prompt: int, num_known: int, *, has_chunk: bool) -> int:
        """Tokens of a chunk from `start` on of a sequence with `num_known` tokens; 0 where `budget` has none for it.

        The budget is not spent.
        """


class AnyBorders:
    """A chunk is whatever the budget allows."""

    def is_spent(self, budget: Budget, *, has_chunk: bool) -> bool:
        return budget.is_spent

    def take(self, budget: Budget, start: int, num_prompt: int, num_known: int, *, has_chunk: bool) -> int:
        return budget.take(start, num_known - start)


@dataclass(frozen=True, slots=True)
class FixedBorders:
    """Every token is computed as it would be if its sequence were alone, however its chunks fall.

    Kernels round a token beside others of its sequence differently from a token alone, and a token beside others
    by the place where their tile begins. So a prompt's chunks end at block borders or with the prompt; a last token
    that has a block to itself is a chunk of its own; and output tokens are computed one by one for ever, up to
    `replay_rows` of them in one step when a sequence is computed again.

    The first chunk of a step may have a block whatever the budget: the decoding rows must not keep prompts waiting.
    """

    block_size: int
    replay_rows: int

    def is_spent(self, budget: Budget, *, has_chunk: bool) -> bool:
        return has_chunk and (budget.is_spent or budget.num_tokens < self.block_size)

    def take(self, budget: Budget, start: int, num_prompt: int, num_known: int, *, has_chunk: bool) -> int:
        wanted = self.length(start, num_prompt, num_known, budget.num_tokens)
        granted = budget.take(start, wanted) if wanted and not budget.is_spent else 0
        length = self.length(start, num_prompt, num_known, granted)
        if not length and not has_chunk:
            length = self.length(start, num_prompt, num_known, self.block_size)
        return length

    def length(self, start: int, num_prompt: int, num_known: int, most: int) -> int:
        """The longest chunk from `start` on that has at most `most` tokens; 0 where none is as short."""
        if start >= num_prompt:
            return min(most, num_known - start, self.replay_rows)
        assert start % self.block_size == 0, f"a prompt's chunk starts at {start}"
        end = min(start + most, num_prompt)
        if end < num_prompt or end % self.block_size == 1:
            aligned = end - end % self.block_size
            return aligned - start if aligned > start else int(end == num_prompt)
        return end - start
