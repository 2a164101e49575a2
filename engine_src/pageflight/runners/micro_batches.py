"""A step cut into micro-batches, which follow each other through the stages of a pipeline.

Shapes: S rows that run, L of them that sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pageflight.core.plan import StepPlan

Int32Array = NDArray[np.int32]


class MicroBatch(NamedTuple):
    """A part of a plan, without its differences, and which of the plan's ids [L] it brings."""

    plan: StepPlan
    lines: Int32Array


class _Piece(NamedTuple):
    row: int  # its place in the plan
    begin: int
    end: int


def micro_batches(plan: StepPlan, count: int, block_size: int) -> list[MicroBatch]:
    """At most `count` parts of about as many tokens each, in an order that keeps every row's.

    Rows of one token are shared out evenly, so those that decode are in the same part of every step while nobody comes
    or goes: that part can begin the next step while the others are in this one. Chunks fill the parts up, cut at
    borders of blocks.
    """
    if count == 1 and plan.rows.size:
        return [MicroBatch(plan, np.arange(int(plan.samples.sum()), dtype=np.int32))]
    single = np.flatnonzero(plan.lengths == 1)
    parts = [
        [_Piece(i, start, start + 1) for i, start in _starts(plan, part)] for part in np.array_split(single, count)
    ]
    goal = -(-plan.num_tokens // count)
    at, room = 0, goal - len(parts[0])
    for row, begin in _starts(plan, np.flatnonzero(plan.lengths > 1)):
        end = begin + int(plan.lengths[row])
        while begin < end:
            if room <= 0 and at < count - 1:
                at += 1
                room += goal - len(parts[at])
                continue
            border = max(begin // block_size + 1, round((begin + room) / block_size)) * block_size
            until = end if at == count - 1 else min(end, border)
            parts[at].append(_Piece(row, begin, until))
            room -= until - begin
            if until < end:  # the next piece is another part's, which makes up for the rounding
                at += 1
                room += goal - len(parts[at])
            begin = until
    return [_made(plan, pieces) for pieces in parts if pieces]


def _starts(plan: StepPlan, indices: NDArray[np.intp]) -> Iterator[tuple[int, int]]:
    return zip(indices.tolist(), plan.starts_at[indices].tolist(), strict=True)


def _made(plan: StepPlan, pieces: list[_Piece]) -> MicroBatch:
    indices, begins, ends = np.array(pieces, np.int32).T
    is_last = ends == plan.starts_at[indices] + plan.lengths[indices]
    samples = plan.samples[indices] & is_last
    lines = np.cumsum(plan.samples, dtype=np.int32)[indices] - 1
    part = StepPlan(step=plan.step, rows=plan.rows[indices], starts_at=begins, lengths=ends - begins, samples=samples)
    return MicroBatch(part, lines[samples])
