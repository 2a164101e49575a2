"""Forward passes put together, extended and taken apart. Shapes as in `lowering.base`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pageflight.lowering.base import StepInputs


class Run(NamedTuple):
    """Tokens of one sequence in one pass: `ids` follow `past` tokens, all of them in `blocks`.

    `takes`: logits after the last of them are wanted.
    """

    ids: Sequence[int]
    past: int
    blocks: Sequence[int]
    takes: bool = True


def pack(runs: Sequence[Run], block_size: int) -> StepInputs:
    """One pass of these runs."""
    lengths = np.array([len(run.ids) for run in runs], np.int32)
    past_lens = np.array([run.past for run in runs], np.int32)
    tables = [run.blocks[: -(-(run.past + len(run.ids)) // block_size)] for run in runs]
    token_begins = _begins(lengths)
    takes = np.array([run.takes for run in runs])
    return StepInputs(
        ids_T=np.concatenate([np.asarray(run.ids, np.int64) for run in runs]),
        positions_T=np.concatenate([np.arange(run.past, run.past + len(run.ids), dtype=np.int64) for run in runs]),
        past_lens_S=past_lens,
        token_begins=token_begins,
        block_indices_N=np.array([block for table in tables for block in table], np.int32),
        block_begins=_begins(np.array([len(table) for table in tables], np.int32)),
        max_context_len=int((past_lens + lengths).max()),
        take_L=(token_begins[1:] - 1)[takes].astype(np.int64),
    )


def extend(inputs: StepInputs, num_tokens: int, blocks: NDArray[np.int32], num_logits: int) -> StepInputs:
    """The same pass with a sequence of `num_tokens` at its end, in `blocks`, and `num_logits` more lines of logits."""
    inputs = replace(inputs, take_L=np.append(inputs.take_L, np.zeros(num_logits, np.int64)))
    if not num_tokens:
        return inputs
    return replace(
        inputs,
        ids_T=np.append(inputs.ids_T, np.zeros(num_tokens, np.int64)),
        positions_T=np.append(inputs.positions_T, np.arange(num_tokens)),
        past_lens_S=np.append(inputs.past_lens_S, np.int32(0)),
        token_begins=np.append(inputs.token_begins, np.int32(inputs.token_begins[-1] + num_tokens)),
        block_indices_N=np.append(inputs.block_indices_N, blocks),
        block_begins=np.append(inputs.block_begins, np.int32(inputs.block_begins[-1] + len(blocks))),
        max_context_len=max(inputs.max_context_len, num_tokens),
    )


def split(inputs: StepInputs, block_size: int) -> Iterator[tuple[StepInputs, slice]]:
    """Passes of one sequence and at most one block each, in order, and which lines of the logits [L] each brings.

    Their borders lie at multiples of `block_size` positions. `take_L` must be ascending.
    """
    taken = 0
    for index, past in enumerate(inputs.past_lens_S.tolist()):
        begin, end = inputs.token_begins[index : index + 2].tolist()
        blocks = inputs.block_indices_N[inputs.block_begins[index] : inputs.block_begins[index + 1]]
        while begin < end:
            length = min(end - begin, block_size - past % block_size)
            until = int(np.searchsorted(inputs.take_L, begin + length))
            piece = StepInputs(
                ids_T=inputs.ids_T[begin : begin + length],
                positions_T=inputs.positions_T[begin : begin + length],
                past_lens_S=np.array([past], np.int32),
                token_begins=np.array([0, length], np.int32),
                block_indices_N=blocks[: -(-(past + length) // block_size)],
                block_begins=np.array([0, -(-(past + length) // block_size)], np.int32),
                max_context_len=past + length,
                take_L=inputs.take_L[taken:until] - begin,
            )
            yield piece, slice(taken, until)
            taken, begin, past = until, begin + length, past + length


def _begins(counts: NDArray[np.int32]) -> NDArray[np.int32]:
    begins = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=begins[1:])
    return begins
