"""Runners without a model: one that notices every mistake of the scheduler, one that costs nothing.

Shapes: R rows, M tokens of the longest sequence, N blocks of the longest sequence, P blocks, B positions in a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from pageflight.core.plan import RowStart, StepPlan, StepResult
from pageflight.core.request import SamplingParams
from pageflight.lowering.base import StepInputs
from pageflight.runners.base import RunnerLimits
from pageflight.runners.inputs import BatchRows

_FRESH = -1  # position of a slot that nothing was written to


class FakeRunner:
    """Computes "K/V" that depends on everything before it, and tokens that depend on all K/V read back.

    The K/V entry of a position hashes its token, its position and the entry before it, read through the row's block
    table as attention would. The next token hashes all entries of the context, read the same way. So a block that is
    lost, given to two sequences, shared wrongly or not copied changes the tokens that come out, exactly as it would
    with a model, while right plans give each sequence the same tokens whatever runs beside it. With temperature above 0
    the token depends on (seed, sequence index, position) as well. Plans that break the contract of `StepPlan` fail an
    assertion.
    """

    def __init__(self, limits: RunnerLimits) -> None:
        self.limits = limits
        num_columns = -(-limits.max_model_len // limits.block_size)
        self._entries = np.zeros((limits.num_blocks, limits.block_size), np.uint64)  # [P, B]
        self._positions = np.full((limits.num_blocks, limits.block_size), _FRESH, np.int64)  # [P, B]
        self._host_entries = np.zeros((limits.num_host_blocks, limits.block_size), np.uint64)
        self._host_positions = np.full((limits.num_host_blocks, limits.block_size), _FRESH, np.int64)
        self._tokens = np.zeros((limits.max_num_seqs, limits.max_model_len), np.int64)  # [R, M]
        self._tables = np.full((limits.max_num_seqs, num_columns), -1, np.int64)  # [R, N]
        self._num_known = [0] * limits.max_num_seqs
        self._holders: dict[int, RowStart] = {}
        self._in_flight: StepPlan | None = None
        self._next_step = 0

    def submit(self, plan: StepPlan) -> None:
        """Apply the plan's differences and begin its forward pass."""
        assert self._in_flight is None, "a plan was submitted before the last one was collected"
        assert plan.step == self._next_step, f"step {plan.step} after step {self._next_step - 1}"
        self._next_step += 1
        for row in plan.ended_rows:
            assert row in self._holders, f"row {row} ended but nothing held it"
            del self._holders[row]
        for start in plan.starts:
            self._start_row(start)
        self._update_tables(plan)
        self._copy_to_and_from_host(plan)
        self._copy(plan)
        self._check_chunks(plan)
        self._in_flight = plan

    def collect(self) -> StepResult:
        """Compute the K/V entries of the submitted plan's chunks, then sample."""
        plan, self._in_flight = self._in_flight, None
        assert plan is not None, "nothing was submitted"
        for chunk in plan.chunks:
            self._compute(chunk.row, chunk.start, chunk.length)
        sampling_rows = plan.rows[plan.samples].tolist()
        ids = [self._sample(row) for row in sampling_rows]
        log_probs = None
        if any(self._holders[row].sampling.log_probs for row in sampling_rows):
            log_probs = np.array([fake_log_prob(token) for token in ids], np.float32)
        for row, token in zip(sampling_rows, ids, strict=True):
            known = self._num_known[row]
            assert known < self.limits.max_model_len, f"row {row} sampled beyond max_model_len"
            self._tokens[row, known] = token
            self._num_known[row] = known + 1
        return StepResult(plan.step, np.array(ids, np.int32), log_probs)

    def step_tokens(self, plan: StepPlan) -> list[int]:
        """Ids of the tokens that a submitted plan computes."""
        return [token for row, start, length, _ in plan.chunks for token in self._tokens[row, start : start + length]]

    def close(self) -> None:
        """Nothing to give back."""

    def _start_row(self, start: RowStart) -> None:
        row, known = start.row, len(start.token_ids)
        assert row not in self._holders, f"row {row} was started while another sequence held it"
        assert 0 < start.num_prompt <= known <= self.limits.max_model_len
        self._holders[row] = start
        self._tables[row] = -1
        self._tokens[row, :known] = start.token_ids
        self._num_known[row] = known

    def _update_tables(self, plan: StepPlan) -> None:
        if plan.table_rows is None:
            return
        assert plan.table_columns is not None and plan.table_blocks is not None
        updates = zip(plan.table_rows.tolist(), plan.table_columns.tolist(), plan.table_blocks.tolist(), strict=True)
        for row, column, block in updates:
            assert row in self._holders, f"the table of row {row} changed, but nothing holds it"
            assert 0 <= block < self.limits.num_blocks, f"block {block} does not exist"
            assert self._tables[row, column] < 0, f"column {column} of row {row} was set twice"
            self._tables[row, column] = block

    def _copy_to_and_from_host(self, plan: StepPlan) -> None:
        if plan.copy_out_blocks is not None:
            assert plan.copy_out_slots is not None
            blocks, slots = plan.copy_out_blocks.tolist(), plan.copy_out_slots.tolist()
            assert len(set(slots)) == len(slots) == len(blocks), "a slot is the target of two copies"
            assert (self._positions[blocks, 0] != _FRESH).all(), "a block is copied out that was never written"
            self._host_entries[slots] = self._entries[blocks]
            self._host_positions[slots] = self._positions[blocks]
        if plan.copy_in_slots is not None:
            assert plan.copy_in_blocks is not None
            slots, blocks = plan.copy_in_slots.tolist(), plan.copy_in_blocks.tolist()
            assert len(set(blocks)) == len(blocks) == len(slots), "a block is the target of two copies"
            assert (self._host_positions[slots, 0] != _FRESH).all(), "a slot is copied in that was never written"
            self._entries[blocks] = self._host_entries[slots]
            self._positions[blocks] = self._host_positions[slots]

    def _copy(self, plan: StepPlan) -> None:
        if plan.copy_sources is None:
            return
        assert plan.copy_targets is not None
        sources, targets = plan.copy_sources.tolist(), plan.copy_targets.tolist()
        assert not set(sources) & set(targets), "a block is source and target of copies in one step"
        assert len(set(targets)) == len(targets), "a block is the target of two copies"
        self._entries[targets] = self._entries[sources]
        self._positions[targets] = self._positions[sources]

    def _check_chunks(self, plan: StepPlan) -> None:
        rows = plan.rows.tolist()
        assert len(rows) == len(plan.starts_at) == len(plan.lengths) == len(plan.samples) > 0
        assert len(set(rows)) == len(rows), "a row runs twice in one step"
        size = self.limits.block_size
        owners: dict[int, set[int]] = {}
        for row in self._holders:
            for block in self._tables[row].tolist():
                if block >= 0:
                    owners.setdefault(block, set()).add(row)
        for row, start, length, samples in plan.chunks:
            assert row in self._holders, f"row {row} runs, but nothing holds it"
            known = self._num_known[row]
            assert length >= 1 and start >= 0 and start + length <= known, f"row {row}: {start}+{length} of {known}"
            assert samples == (start + length == known), f"row {row}: samples={samples} at {start + length} of {known}"
            for column in range(start // size, (start + length - 1) // size + 1):
                block = int(self._tables[row, column])
                assert block >= 0, f"row {row} writes to position {column * size} without a block"
                assert owners[block] == {row}, f"rows {owners[block]} hold block {block}, row {row} writes to it"

    def _slot(self, row: int, position: int) -> tuple[int, int]:
        column, offset = divmod(position, self.limits.block_size)
        return int(self._tables[row, column]), offset

    def _compute(self, row: int, start: int, length: int) -> None:
        if start:
            slot = self._slot(row, start - 1)
            assert self._positions[slot] == start - 1, f"row {row}: position {start - 1} was not computed"
            before = int(self._entries[slot])
        else:
            before = 0
        for position in range(start, start + length):
            slot = self._slot(row, position)
            before = _hash64(before, int(self._tokens[row, position]), position)
            self._entries[slot] = before
            self._positions[slot] = position

    def _sample(self, row: int) -> int:
        """The next token of `row`: a hash of the whole context as its block table shows it."""
        known, size, start = self._num_known[row], self.limits.block_size, self._holders[row]
        blocks = self._tables[row, : -(-known // size)]
        found = self._positions[blocks].reshape(-1)[:known]
        wrong = np.flatnonzero(found != np.arange(known))
        assert not len(wrong), f"row {row}: position {wrong[0]} holds {found[wrong[0]]}"
        context = self._entries[blocks].reshape(-1)[:known]
        return _next_token(context, start.sampling, start.sequence_index, self.limits.vocab_size)


def fake_continuation(
    prompt_ids: Sequence[int], sampling: SamplingParams, *, sequence_index: int = 0, vocab_size: int
) -> list[int]:
    """What FakeRunner answers to a prompt up to `max_tokens` or a stop id, computed without rows, blocks or steps."""
    entries: list[int] = []
    output_ids: list[int] = []
    for position in range(len(prompt_ids) + sampling.max_tokens):
        if position >= len(prompt_ids):
            context = np.array(entries, np.uint64)
            output_ids.append(_next_token(context, sampling, sequence_index, vocab_size))
            if len(output_ids) > sampling.min_tokens and output_ids[-1] in sampling.stop_token_ids:
                break
        token = output_ids[-1] if output_ids else prompt_ids[position]
        entries.append(_hash64(entries[-1] if entries else 0, token, position))
    return output_ids


def _next_token(context: NDArray[np.uint64], sampling: SamplingParams, sequence_index: int, vocab_size: int) -> int:
    digest = blake2b(context.tobytes(), digest_size=8)
    if sampling.temperature > 0:
        digest.update(repr((sampling.seed, sequence_index, len(context))).encode())
    return int.from_bytes(digest.digest(), "little") % vocab_size


def fake_log_prob(token: int) -> float:
    """The log probability that FakeRunner claims for `token`: exact in float32."""
    return -(token % 64) / 8.0


def _hash64(*numbers: int) -> int:
    return int.from_bytes(blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")


class InstantRunner:
    """Prepares the inputs of every step as a real runner does, and answers at once with ids that cost nothing.

    For measuring everything but the model. A row's ids walk through the vocabulary from `first_id`, so ids below it
    (special tokens) never appear.
    """

    def __init__(self, limits: RunnerLimits, *, first_id: int = 0) -> None:
        assert 0 <= first_id < limits.vocab_size
        self.limits = limits
        self.inputs: StepInputs | None = None
        self._rows = BatchRows(
            max_num_seqs=limits.max_num_seqs, max_model_len=limits.max_model_len, block_size=limits.block_size
        )
        self._first_id = first_id
        self._plan: StepPlan | None = None

    def submit(self, plan: StepPlan) -> None:
        """Apply the plan and prepare what a model would be given."""
        assert self._plan is None, "a plan was submitted before the last one was collected"
        self._rows.apply(plan)
        self.inputs = self._rows.prepare(plan)
        self._plan = plan

    def collect(self) -> StepResult:
        """Ids for the rows that sample, at once."""
        plan, self._plan = self._plan, None
        assert plan is not None, "nothing was submitted"
        rows = plan.rows[plan.samples]
        ends = plan.starts_at[plan.samples] + plan.lengths[plan.samples]
        ids: NDArray[np.int32] = self._first_id + ends % np.int32(self.limits.vocab_size - self._first_id)
        self._rows.append(rows, ids)
        return StepResult(plan.step, ids)

    def close(self) -> None:
        """Nothing to give back."""
