"""The next plan while it is being made, and a plan that is under way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pageflight.core.plan import RowStart, StepPlan
from pageflight.kv.host_tier import HostCopies
from pageflight.sched.sequence import Sequence
from pageflight.sched.step_time import Load


@dataclass(slots=True)
class Chunks:
    """Prompt chunks of the plan being made, by rank, column by column."""

    sequences: list[Sequence] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    completed: list[Sequence] = field(default_factory=list)

    def add(self, sequence: Sequence, length: int) -> None:
        """`length` further tokens of a prefilling sequence."""
        self.sequences.append(sequence)
        self.starts.append(sequence.num_computed)
        self.lengths.append(length)

    def trim(self, num_decoding: int, tile: int) -> None:
        """Leave for the next step what would only just begin another tile of `tile` tokens.

        An engine pays for a whole tile however little of it is used. Up to half a tile is cheaper in the next step,
        beside the rows that decode; the first chunk always keeps a token, so every step that has one gets on.
        """
        total = num_decoding + sum(self.lengths)
        excess = total % tile
        if total < tile or excess > tile // 2:
            return
        while excess and len(self.lengths) > 1 and self.lengths[-1] <= excess:
            excess -= self.lengths.pop()
            self.sequences.pop()
            self.starts.pop()
        if excess < self.lengths[-1]:
            self.lengths[-1] -= excess


@dataclass(slots=True, eq=False)
class Flight:
    """A plan that is not settled yet, and what tells whether its rows still have the holders they had."""

    plan: StepPlan
    num_releases: int
    epochs: NDArray[np.int64]  # [S]
    all_sample: bool
    completed: list[Sequence]  # their prompt is computed by this plan
    num_context_tokens: int
    num_generation_rows: int
    planned_s: float
    load: Load | None  # for the pacer


@dataclass(slots=True)
class Draft:
    """Differences to be told to the runner. A row that starts and ends between two plans leaves no trace."""

    ended_rows: set[int] = field(default_factory=set)
    starts: dict[int, RowStart] = field(default_factory=dict)
    table: list[tuple[int, int, int]] = field(default_factory=list)  # row, column, block
    copies: list[tuple[int, int, int]] = field(default_factory=list)  # row that wants it, source, target

    def start(self, start: RowStart, blocks: Iterable[int]) -> None:
        """A sequence takes a row with these blocks."""
        self.starts[start.row] = start
        self.table.extend((start.row, column, block) for column, block in enumerate(blocks))

    def end(self, row: int) -> list[int]:
        """A row is released; returns the sources of copies that are not wanted any more."""
        if self.table:
            self.table = [update for update in self.table if update[0] != row]
        if self.starts.pop(row, None) is None:
            self.ended_rows.add(row)
            return []
        dropped = [source for wanted_by, source, _target in self.copies if wanted_by == row]
        self.copies = [copy for copy in self.copies if copy[0] != row]
        return dropped

    def copy_sources(self) -> list[int]:
        """Blocks to be copied; one reference to each is held until the plan is made."""
        return [source for _row, source, _target in self.copies]

    def finish(
        self,
        step: int,
        rows: NDArray[np.int32],
        starts_at: NDArray[np.int32],
        lengths: NDArray[np.int32],
        samples: NDArray[np.bool_],
        host: HostCopies,
    ) -> StepPlan:
        """The plan: these chunks, after the differences gathered here."""
        table_rows = table_columns = table_blocks = copy_sources = copy_targets = None
        out_blocks = out_slots = in_slots = in_blocks = None
        if self.table:
            table_rows, table_columns, table_blocks = np.array(self.table, np.int32).T.copy()
        if self.copies:
            _rows, copy_sources, copy_targets = np.array(self.copies, np.int32).T.copy()
        if host.outs:
            out_blocks, out_slots = np.array(host.outs, np.int32).T.copy()
        if host.ins:
            in_slots, in_blocks = np.array(host.ins, np.int32).T.copy()
        return StepPlan(
            step=step,
            rows=rows,
            starts_at=starts_at,
            lengths=lengths,
            samples=samples,
            starts=tuple(self.starts.values()),
            ended_rows=tuple(sorted(self.ended_rows)),
            table_rows=table_rows,
            table_columns=table_columns,
            table_blocks=table_blocks,
            copy_sources=copy_sources,
            copy_targets=copy_targets,
            copy_out_blocks=out_blocks,
            copy_out_slots=out_slots,
            copy_in_slots=in_slots,
            copy_in_blocks=in_blocks,
        )
