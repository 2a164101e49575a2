"""The next plan while it is being made: what changed in rows, tables and blocks since the last one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pageflight.core.plan import RowStart


@dataclass(slots=True)
class Draft:
    """Differences to be told to the runner. A row that starts and ends between two plans leaves no trace."""

    ended_rows: set[int] = field(default_factory=set)
    starts: dict[int, RowStart] = field(default_factory=dict)
    table: list[tuple[int, int, int]] = field(default_factory=list)  # row, column, block
    copies: list[tuple[int, int, int]] = field(default_factory=list)  # row that wants it, source, target
    held_sources: list[int] = field(default_factory=list)  # one reference each, until the plan is made

    def start(self, start: RowStart, blocks: Iterable[int]) -> None:
        self.starts[start.row] = start
        self.table.extend((start.row, column, block) for column, block in enumerate(blocks))

    def end(self, row: int) -> None:
        if row in self.starts:
            del self.starts[row]
            self.copies = [copy for copy in self.copies if copy[0] != row]
        else:
            self.ended_rows.add(row)
        if self.table:
            self.table = [update for update in self.table if update[0] != row]

    def tables_as_arrays(self) -> tuple[NDArray[np.int32] | None, ...]:
        """Rows, columns, blocks, copy sources and copy targets, each [U] or [C] int32, or None for nothing."""
        rows = columns = blocks = sources = targets = None
        if self.table:
            rows, columns, blocks = np.array(self.table, np.int32).T.copy()
        if self.copies:
            _, sources, targets = np.array(self.copies, np.int32).T.copy()
        return rows, columns, blocks, sources, targets
