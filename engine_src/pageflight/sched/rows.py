"""The persistent batch: state of the running sequences as arrays indexed by row.

Shapes: R rows, M tokens of the longest sequence, N blocks of the longest sequence, K stop ids kept in the arrays.
A decode step reads and writes these arrays whole; Python touches single rows only when a sequence comes or goes.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from pageflight.kv.capacity import blocks_for
from pageflight.sched.sequence import Sequence

NUM_STOP_COLUMNS = 4  # rows with more stop ids are looked at one by one


class Rows:
    """Rows 0 … num_rows - 1, each free or held by one sequence."""

    def __init__(self, num_rows: int, max_len: int, block_size: int) -> None:
        num_columns = blocks_for(max_len, block_size)
        self.num_rows = num_rows
        self.block_size = block_size
        self.tokens = np.zeros((num_rows, max_len), np.int32)  # [R, M]
        self.tables = np.zeros((num_rows, num_columns), np.int32)  # [R, N]
        self.num_blocks = np.zeros(num_rows, np.int32)  # held, the used part of a row's table
        self.num_known = np.zeros(num_rows, np.int32)  # tokens, with those sampled by steps that are not settled
        self.num_settled = np.zeros(num_rows, np.int32)  # tokens whose ids are here
        self.num_prompt = np.zeros(num_rows, np.int32)
        self.num_shared = np.zeros(num_rows, np.int32)  # of its blocks, those that it found computed
        self.max_len = np.zeros(num_rows, np.int32)  # length at which max_tokens ends the row
        self.min_len = np.zeros(num_rows, np.int32)  # length up to which a stop id does not end it
        self.handles = np.zeros(num_rows, np.int64)
        self.epochs = np.zeros(num_rows, np.int64)  # how often the row was released: tells its holders apart
        self.levels = np.zeros(num_rows, np.float64)  # first part of the rank
        self.serials = np.full(num_rows, -1, np.int64)  # second part of the rank; -1 for free rows
        self.lanes = np.full(num_rows, -1, np.int32)  # of the tenant, where the policy keeps accounts
        self.decoding = np.zeros(num_rows, np.bool_)  # takes part in the next step with its last token
        self.stop_ids = np.full((NUM_STOP_COLUMNS, num_rows), -1, np.int32)  # [K, R]
        self.num_stop_columns = 0  # columns that any row has used
        self.long_stop_ids: dict[int, frozenset[int]] = {}  # row → ids, for rows with more than K
        self.sequences: list[Sequence | None] = [None] * num_rows
        self.num_releases = 0
        self._free = list(range(num_rows))  # heap: low rows first keeps the batch dense

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return self.num_rows - len(self._free)

    def take(self, sequence: Sequence, blocks: list[int]) -> int:
        """Give the lowest free row to `sequence`, with its tokens and these blocks."""
        row = heapq.heappop(self._free)
        known = len(sequence.tokens)
        sampling = sequence.request.sampling
        self.sequences[row] = sequence
        self.tokens[row, :known] = sequence.tokens
        self.tables[row, : len(blocks)] = blocks
        self.num_blocks[row] = len(blocks)
        self.num_known[row] = self.num_settled[row] = known
        self.num_prompt[row] = sequence.num_prompt
        self.num_shared[row] = sequence.num_shared
        self.max_len[row] = sequence.max_len
        self.min_len[row] = sequence.num_prompt + sampling.min_tokens
        self.handles[row] = sequence.handle
        self.levels[row], self.serials[row] = sequence.rank
        self.lanes[row] = sequence.tenant.lane
        stop_ids = sampling.stop_token_ids
        self.stop_ids[:, row] = -1
        if len(stop_ids) <= NUM_STOP_COLUMNS:
            self.stop_ids[: len(stop_ids), row] = stop_ids
            self.num_stop_columns = max(self.num_stop_columns, len(stop_ids))
        else:
            self.long_stop_ids[row] = frozenset(stop_ids)
        sequence.row = row
        return row

    def release(self, row: int) -> list[int]:
        """Free the row and return its blocks, first to last. Its sequence keeps the tokens whose ids are known."""
        sequence = self.held_by(row)
        assert sequence.row == row
        sequence.tokens = self.tokens[row, : self.num_settled[row]].copy()
        sequence.row = -1
        blocks = self.blocks(row)
        self.sequences[row] = None
        self.num_blocks[row] = self.max_len[row] = 0
        self.serials[row] = -1
        self.decoding[row] = False
        self.epochs[row] += 1
        self.long_stop_ids.pop(row, None)
        self.num_releases += 1
        heapq.heappush(self._free, row)
        return blocks

    def held_by(self, row: int) -> Sequence:
        """The sequence that holds `row`."""
        sequence = self.sequences[row]
        assert sequence is not None, f"row {row} is free"
        return sequence

    def held(self) -> NDArray[np.int32]:
        """The rows that are not free."""
        return np.flatnonzero(self.serials >= 0).astype(np.int32)

    def by_rank(self, rows: NDArray[np.int32], excess: NDArray[np.float64] | None) -> NDArray[np.int32]:
        """`rows` by `excess` where it matters, then by rank: who is served last comes last."""
        keys = (self.serials[rows], self.levels[rows])
        order: NDArray[np.intp] = np.lexsort(keys if excess is None else (*keys, excess))
        return rows[order]

    def num_growing(self) -> int:
        """How many running sequences will still need a block that they do not hold yet."""
        return int(np.count_nonzero(self.max_len - 1 > self.num_blocks * self.block_size))

    def num_missing(self) -> int:
        """How many blocks all running sequences will still need until their full length."""
        full = (self.max_len - 2) // self.block_size + 1
        return int(np.maximum(full - self.num_blocks, 0).sum())

    def blocks(self, row: int) -> list[int]:
        """The row's blocks, first to last."""
        blocks: list[int] = self.tables[row, : self.num_blocks[row]].tolist()
        return blocks

    def append_block(self, row: int, block: int) -> int:
        """Put `block` at the end of the row's table; returns its column."""
        column = int(self.num_blocks[row])
        self.tables[row, column] = block
        self.num_blocks[row] = column + 1
        return column

    def stopped(self, rows: NDArray[np.int32], ids: NDArray[np.int32], lengths: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which of `rows`, now `lengths` long with `ids` as their last tokens, meet one of their stop ids."""
        hit = np.zeros(len(rows), np.bool_)
        for column in range(self.num_stop_columns):
            hit |= self.stop_ids[column][rows] == ids
        if self.long_stop_ids:
            for index, row in enumerate(rows.tolist()):
                long = self.long_stop_ids.get(row)
                if long is not None and int(ids[index]) in long:
                    hit[index] = True
        if hit.any():
            hit &= lengths > self.min_len[rows]
        return hit

    def check(self) -> None:
        """Assert that every row is free or held, and that what each holds fits together."""
        free = set(self._free)
        assert len(free) == len(self._free), "a row is free twice"
        for row, sequence in enumerate(self.sequences):
            assert (sequence is None) == (row in free), f"row {row} is neither free nor held, or both"
            if sequence is None:
                assert not self.decoding[row] and not self.num_blocks[row], f"free row {row} still holds something"
                continue
            assert sequence.row == row and self.handles[row] == sequence.handle
            known, settled = int(self.num_known[row]), int(self.num_settled[row])
            assert sequence.num_prompt <= settled <= known <= self.max_len[row], f"row {row}: {settled}, {known} tokens"
            room = int(self.num_blocks[row]) * self.block_size
            assert room >= known - 1, f"row {row}: {known} tokens, {room} positions in its blocks"
