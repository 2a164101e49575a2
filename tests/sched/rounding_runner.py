"""A FakeRunner that rounds as kernels do: what a token becomes depends on how it was computed, not on values alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pageflight.core.request import SamplingParams
from pageflight.runners.base import RunnerLimits
from pageflight.runners.fake import FakeRunner, _hash64, _next_token


class RoundingRunner(FakeRunner):
    """The K/V entry of a position also hashes the tile of tokens that it was computed in.

    Tiles of `block_size` tokens begin where a chunk begins; a chunk of one token has a kernel of its own. Output tokens
    are computed one by one, however long their chunk is. `replay_rows` is the most of them that one step may have.
    """

    def __init__(self, limits: RunnerLimits, replay_rows: int) -> None:
        super().__init__(limits)
        self._replay_rows = replay_rows

    def _compute(self, row: int, start: int, length: int) -> None:
        is_output = start >= self._holders[row].num_prompt
        assert length <= self._replay_rows or not is_output, f"{length} output tokens computed again in one step"
        num_at_once = 1 if is_output else length
        for first in range(start, start + length, num_at_once):
            self._compute_together(row, first, num_at_once)

    def _compute_together(self, row: int, start: int, length: int) -> None:
        before = int(self._entries[self._slot(row, start - 1)]) if start else 0
        if start:
            assert self._positions[self._slot(row, start - 1)] == start - 1, f"position {start - 1} was not computed"
        for position in range(start, start + length):
            slot = self._slot(row, position)
            tile = tile_of(position, start, start + length, self.limits.block_size)
            before = _hash64(before, int(self._tokens[row, position]), position, *tile)
            self._entries[slot] = before
            self._positions[slot] = position


def tile_of(position: int, start: int, end: int, block_size: int) -> tuple[int, int]:
    """First token of the tile and its tokens; a chunk of one token has 0."""
    if end - start == 1:
        return position, 0
    begin = start + (position - start) // block_size * block_size
    return begin, min(block_size, end - begin)


def alone(
    prompt_ids: Sequence[int], sampling: SamplingParams, *, sequence_index: int, vocab_size: int, block_size: int
) -> list[int]:
    """What RoundingRunner answers to a prompt that is computed block by block, without rows, blocks or steps."""
    entries: list[int] = []
    output_ids: list[int] = []
    num_prompt = len(prompt_ids)
    for position in range(num_prompt + sampling.max_tokens):
        begin = position // block_size * block_size
        tile = tile_of(position, begin, min(begin + block_size, num_prompt), block_size)
        if position >= num_prompt:
            context = np.array(entries, np.uint64)
            output_ids.append(_next_token(context, sampling, sequence_index, vocab_size))
            if len(output_ids) > sampling.min_tokens and output_ids[-1] in sampling.stop_token_ids:
                break
            tile = (position, 0)
        token = output_ids[-1] if output_ids else prompt_ids[position]
        entries.append(_hash64(entries[-1] if entries else 0, token, position, *tile))
    return output_ids
