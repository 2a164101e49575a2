"""BatchRows: the runner's mirror of the scheduler's rows, and the arrays of a step made from it.

R rows in all, M greatest length of a sequence, B most blocks of a sequence; S rows that run, T packed tokens, N block
indices, L rows that sample. A decode step is array operations only: Python objects are touched for rows that start.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pageflight.core.plan import RowStart, StepPlan
from pageflight.lowering.base import StepInputs

Int32Array = NDArray[np.int32]


class BatchRows:
    """Tokens and block tables by row, kept up by `apply`, read by `prepare`, extended by `append`."""

    def __init__(self, *, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self.block_size = block_size
        self.tokens_RM = np.zeros((max_num_seqs, max_model_len), np.int32)
        self.num_tokens_R = np.zeros(max_num_seqs, np.int32)
        self.tables_RB = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self._arange = np.arange(max(max_num_seqs + 1, 1024), dtype=np.int32)

    def apply(self, plan: StepPlan) -> None:
        """Rows that ended, rows that start, then block tables: the plan's differences, in its order."""
        for row in plan.ended_rows:
            self.num_tokens_R[row] = 0
        for start in plan.starts:
            self._start(start)
        if plan.table_rows is not None and plan.table_columns is not None and plan.table_blocks is not None:
            self.tables_RB[plan.table_rows, plan.table_columns] = plan.table_blocks

    def _start(self, start: RowStart) -> None:
        num_tokens = start.token_ids.size
        assert 0 < num_tokens <= self.tokens_RM.shape[1], "a sequence starts with at least one token and fits its row"
        self.tokens_RM[start.row, :num_tokens] = start.token_ids
        self.num_tokens_R[start.row] = num_tokens

    def prepare(self, plan: StepPlan) -> StepInputs:
        """The forward pass of `plan`, whose differences have been applied; every array is new."""
        rows_S, past_lens_S, lengths_S = plan.rows, plan.starts_at, plan.lengths
        ends_S = past_lens_S + lengths_S
        num_tokens_S = self.num_tokens_R[rows_S]
        assert (ends_S <= num_tokens_S).all(), "a row runs tokens that it does not have"
        assert (ends_S == num_tokens_S)[plan.samples].all(), "a row samples before its last token"
        token_begins = _begins(lengths_S)
        num_packed = int(token_begins[-1])
        if num_packed == rows_S.size:
            token_rows_T, positions_T = rows_S, past_lens_S
        else:
            token_rows_T = np.repeat(rows_S, lengths_S)
            positions_T = np.repeat(past_lens_S - token_begins[:-1], lengths_S) + self._counting(num_packed)
        num_blocks_S = -(-ends_S // self.block_size)
        block_begins = _begins(num_blocks_S)
        block_rows_N = np.repeat(rows_S, num_blocks_S)
        columns_N = self._counting(int(block_begins[-1])) - np.repeat(block_begins[:-1], num_blocks_S)
        return StepInputs(
            ids_T=self.tokens_RM[token_rows_T, positions_T].astype(np.int64),
            positions_T=positions_T.astype(np.int64),
            past_lens_S=past_lens_S.astype(np.int32),
            token_begins=token_begins,
            block_indices_N=self.tables_RB[block_rows_N, columns_N],
            block_begins=block_begins,
            max_context_len=int(ends_S.max()),
            take_L=(token_begins[1:] - 1)[plan.samples].astype(np.int64),
        )

    def append(self, rows_L: Int32Array, ids_L: Int32Array) -> None:
        """Sampled ids become their rows' next tokens."""
        lengths_L = self.num_tokens_R[rows_L]
        assert (lengths_L < self.tokens_RM.shape[1]).all(), "a full row sampled once more"
        self.tokens_RM[rows_L, lengths_L] = ids_L
        self.num_tokens_R[rows_L] = lengths_L + 1

    def _counting(self, count: int) -> Int32Array:
        """0 … count - 1; a view of one array that grows when it must."""
        if count > self._arange.size:
            self._arange = np.arange(2 * count, dtype=np.int32)
        return self._arange[:count]


def _begins(counts_S: Int32Array) -> Int32Array:
    """Where each of consecutive pieces begins, and where the last one ends: int32 [S + 1]."""
    begins = np.zeros(counts_S.size + 1, np.int32)
    np.cumsum(counts_S, out=begins[1:])
    return begins
