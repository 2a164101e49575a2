"""BatchRows: the runner's mirror of the scheduler's rows, and the arrays of a step made from it.

R rows in all, M greatest length of a sequence, B most blocks of a sequence; S rows that run, T packed tokens, N block
indices, L rows that sample. A decode step is array operations only: Python objects are touched for rows that start.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pageflight.core.plan import RowStart, StepPlan
from pageflight.lowering.base import StepInputs

Int32Array = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class _DecodeLayout:
    """What one decode step leaves for the next: it holds as long as the same rows run in the same blocks."""

    rows_S: Int32Array
    num_blocks_S: Int32Array
    token_begins: Int32Array
    block_indices_N: Int32Array
    block_begins: Int32Array
    take_L: NDArray[np.int64]


class BatchRows:
    """Tokens and block tables by row, kept up by `apply`, read by `prepare`, extended by `append`.

    No array of a StepInputs is changed later, but successive decode steps may share some: a lowering may tell by
    identity that such an input is as it was. `splits_output`: a chunk of output tokens runs as rows of one token each.
    """

    def __init__(self, *, max_num_seqs: int, max_model_len: int, block_size: int, splits_output: bool = False) -> None:
        self.block_size = block_size
        self.tokens_RM = np.zeros((max_num_seqs, max_model_len), np.int32)
        self.num_tokens_R = np.zeros(max_num_seqs, np.int32)
        self._num_prompt_R = np.zeros(max_num_seqs, np.int32)
        self._splits_output = splits_output
        self.tables_RB = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self._arange = np.arange(max(max_num_seqs + 1, 1024), dtype=np.int32)
        self._layout: _DecodeLayout | None = None
        self._staged: StepPlan | None = None

    def apply(self, plan: StepPlan) -> None:
        """Rows that ended, rows that start, then block tables: the plan's differences, in its order."""
        for row in plan.ended_rows:
            self.num_tokens_R[row] = 0
        for start in plan.starts:
            self._start(start)
        if plan is self._staged:
            self._staged = None
        else:
            self._apply_tables(plan)

    def stage(self, plan: StepPlan) -> None:
        """Block tables and layout of the next plan, which starts and ends no row, while its tokens are computed."""
        self._apply_tables(plan)
        self._staged = plan
        if (plan.lengths == 1).all() and plan.samples.all():
            self._decode_layout(plan.rows, plan.starts_at // self.block_size + 1)

    def _apply_tables(self, plan: StepPlan) -> None:
        if plan.table_rows is not None and plan.table_columns is not None and plan.table_blocks is not None:
            self.tables_RB[plan.table_rows, plan.table_columns] = plan.table_blocks
            self._layout = None

    def _start(self, start: RowStart) -> None:
        num_tokens = start.token_ids.size
        assert 0 < num_tokens <= self.tokens_RM.shape[1], "a sequence starts with at least one token and fits its row"
        self.tokens_RM[start.row, :num_tokens] = start.token_ids
        self.num_tokens_R[start.row] = num_tokens
        self._num_prompt_R[start.row] = start.num_prompt

    def prepare(self, plan: StepPlan) -> StepInputs:
        """The forward pass of `plan`, whose differences have been applied."""
        num_tokens_S = self.num_tokens_R[plan.rows]
        ends_S = plan.starts_at + plan.lengths
        assert (ends_S <= num_tokens_S).all(), "a row runs tokens that it does not have"
        assert (ends_S == num_tokens_S)[plan.samples].all(), "a row samples before its last token"
        if plan.num_tokens == plan.rows.size and plan.samples.all():
            return self._decode(plan)
        if self._splits_output:
            plan = self._split_output(plan)
            ends_S = plan.starts_at + plan.lengths
        token_begins = _begins(plan.lengths)
        offsets_T = np.repeat(plan.starts_at - token_begins[:-1], plan.lengths)
        positions_T = offsets_T + self._counting(int(token_begins[-1]))
        num_blocks_S = -(-ends_S // self.block_size)
        block_begins = _begins(num_blocks_S)
        return StepInputs(
            ids_T=self.tokens_RM[np.repeat(plan.rows, plan.lengths), positions_T].astype(np.int64),
            positions_T=positions_T.astype(np.int64),
            past_lens_S=plan.starts_at.astype(np.int32),
            token_begins=token_begins,
            block_indices_N=self._blocks(plan.rows, num_blocks_S, block_begins),
            block_begins=block_begins,
            max_context_len=int(ends_S.max()),
            take_L=(token_begins[1:] - 1)[plan.samples].astype(np.int64),
        )

    def _split_output(self, plan: StepPlan) -> StepPlan:
        """The same tokens, with those of output in rows of their own; the last of a row samples if it did."""
        is_output_S = plan.starts_at >= self._num_prompt_R[plan.rows]
        counts_S = np.where(is_output_S, plan.lengths, 1)
        if counts_S.max() == 1:
            return plan
        begins = _begins(counts_S)
        index_E = np.repeat(np.arange(counts_S.size), counts_S)
        offsets_E = self._counting(int(begins[-1])) - begins[index_E]
        return replace(
            plan,
            rows=plan.rows[index_E],
            starts_at=plan.starts_at[index_E] + offsets_E,
            lengths=np.where(is_output_S, 1, plan.lengths)[index_E],
            samples=plan.samples[index_E] & (offsets_E == counts_S[index_E] - 1),
        )

    def _decode(self, plan: StepPlan) -> StepInputs:
        """One token for every row."""
        rows_S, past_lens_S = plan.rows, plan.starts_at.astype(np.int32)
        layout = self._decode_layout(rows_S, past_lens_S // self.block_size + 1)
        return StepInputs(
            ids_T=self.tokens_RM[rows_S, past_lens_S].astype(np.int64),
            positions_T=past_lens_S.astype(np.int64),
            past_lens_S=past_lens_S,
            token_begins=layout.token_begins,
            block_indices_N=layout.block_indices_N,
            block_begins=layout.block_begins,
            max_context_len=int(past_lens_S.max()) + 1,
            take_L=layout.take_L,
        )

    def _decode_layout(self, rows_S: Int32Array, num_blocks_S: Int32Array) -> _DecodeLayout:
        """The last step's layout where it still holds, else a new one."""
        layout = self._layout
        if layout is None or layout.rows_S is not rows_S or not np.array_equal(layout.num_blocks_S, num_blocks_S):
            block_begins = _begins(num_blocks_S)
            layout = _DecodeLayout(
                rows_S,
                num_blocks_S,
                np.arange(rows_S.size + 1, dtype=np.int32),
                self._blocks(rows_S, num_blocks_S, block_begins),
                block_begins,
                np.arange(rows_S.size),
            )
            self._layout = None if rows_S.flags.writeable else layout
        return layout

    def _blocks(self, rows_S: Int32Array, num_blocks_S: Int32Array, block_begins: Int32Array) -> Int32Array:
        """The first `num_blocks_S` blocks of each row, one row after another: int32 [N]."""
        columns_N = self._counting(int(block_begins[-1])) - np.repeat(block_begins[:-1], num_blocks_S)
        return self.tables_RB[np.repeat(rows_S, num_blocks_S), columns_N]

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
