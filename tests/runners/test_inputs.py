from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pageflight.core.plan import RowStart, StepPlan
from pageflight.core.request import SamplingParams
from pageflight.lowering.base import StepInputs
from pageflight.runners.inputs import BatchRows


def plan(
    chunks: list[tuple[int, int, int, bool]],
    starts: tuple[RowStart, ...] = (),
    ended: tuple[int, ...] = (),
    table: tuple[tuple[int, int, int], ...] = (),
) -> StepPlan:
    rows, begins, lengths, samples = zip(*chunks, strict=True) if chunks else ((), (), (), ())
    updates = np.array(table, np.int32).reshape(-1, 3).T
    return StepPlan(
        step=0,
        rows=np.array(rows, np.int32),
        starts_at=np.array(begins, np.int32),
        lengths=np.array(lengths, np.int32),
        samples=np.array(samples, np.bool_),
        starts=starts,
        ended_rows=ended,
        table_rows=updates[0],
        table_columns=updates[1],
        table_blocks=updates[2],
    )


def start(row: int, ids: list[int], num_prompt: int = 0) -> RowStart:
    return RowStart(row, row, 0, np.array(ids, np.int32), num_prompt or len(ids), SamplingParams())


def test_chunks_and_decode_tokens_are_packed_one_after_another() -> None:
    rows = BatchRows(max_num_seqs=4, max_model_len=16, block_size=4)
    table = ((2, 0, 7), (2, 1, 5), (0, 0, 3), (3, 0, 1), (3, 1, 9))
    step = plan(
        [(3, 4, 1, True), (2, 1, 5, False), (0, 0, 2, True)],
        starts=(start(0, [10, 11]), start(2, [20, 21, 22, 23, 24, 25, 26]), start(3, [30, 31, 32, 33, 34], 2)),
        table=table,
    )
    rows.apply(step)
    inputs = rows.prepare(step)
    assert inputs.ids_T.tolist() == [34, 21, 22, 23, 24, 25, 10, 11]
    assert inputs.positions_T.tolist() == [4, 1, 2, 3, 4, 5, 0, 1]
    assert inputs.past_lens_S.tolist() == [4, 1, 0]
    assert inputs.token_begins.tolist() == [0, 1, 6, 8]
    assert inputs.block_indices_N.tolist() == [1, 9, 7, 5, 3]
    assert inputs.block_begins.tolist() == [0, 2, 4, 5]
    assert inputs.max_context_len == 6
    assert inputs.take_L.tolist() == [0, 7]
    types = {name: getattr(inputs, name).dtype for name in ("ids_T", "positions_T", "take_L")}
    assert set(types.values()) == {np.dtype(np.int64)}
    assert {inputs.past_lens_S.dtype, inputs.token_begins.dtype, inputs.block_indices_N.dtype} == {np.dtype(np.int32)}


def test_the_arrays_of_a_step_are_plain_loops_over_its_rows() -> None:
    """The repeat-and-count tricks against the obvious loops, on random batches."""
    generator = np.random.default_rng(4)
    for _ in range(50):
        block_size = int(generator.integers(1, 9))
        rows = BatchRows(max_num_seqs=12, max_model_len=60, block_size=block_size)
        rows.tables_RB[:] = generator.permutation(rows.tables_RB.size).reshape(rows.tables_RB.shape)
        chosen = generator.permutation(12)[: generator.integers(1, 13)].tolist()
        starts, chunks = [], []
        for row in chosen:
            known = int(generator.integers(1, 61))
            starts.append(start(row, generator.integers(0, 999, known).tolist()))
            begin = int(generator.integers(0, known))
            length = int(generator.integers(1, known - begin + 1)) if generator.random() < 0.5 else known - begin
            chunks.append((row, begin, length, begin + length == known and bool(generator.random() < 0.8)))
        step = plan(chunks, starts=tuple(starts))
        rows.apply(step)
        inputs = rows.prepare(step)
        ids, positions, blocks, take = [], [], [], []
        for row, begin, length, samples in chunks:
            ids += rows.tokens_RM[row, begin : begin + length].tolist()
            positions += range(begin, begin + length)
            blocks += rows.tables_RB[row, : -(-(begin + length) // block_size)].tolist()
            if samples:
                take.append(len(ids) - 1)
        assert inputs.ids_T.tolist() == ids
        assert inputs.positions_T.tolist() == positions
        assert inputs.block_indices_N.tolist() == blocks
        assert inputs.take_L.tolist() == take


def test_a_row_that_ended_and_starts_again_in_one_plan_is_the_new_one() -> None:
    """Ended rows come first: applied after the starts they wiped the newcomer."""
    rows = BatchRows(max_num_seqs=1, max_model_len=8, block_size=4)
    rows.apply(plan([], starts=(start(0, [1, 2, 3]),), table=((0, 0, 5),)))
    step = plan([(0, 0, 2, True)], starts=(start(0, [8, 9]),), ended=(0,), table=((0, 0, 6),))
    rows.apply(step)
    inputs = rows.prepare(step)
    assert inputs.ids_T.tolist() == [8, 9] and inputs.block_indices_N.tolist() == [6]


def test_an_appended_id_is_the_rows_next_token() -> None:
    rows = BatchRows(max_num_seqs=3, max_model_len=8, block_size=4)
    rows.apply(plan([], starts=(start(0, [1, 2, 3]), start(2, [4]))))
    rows.append(np.array([2, 0], np.int32), np.array([50, 60], np.int32))
    step = plan([(0, 3, 1, True), (2, 1, 1, True)])
    assert rows.prepare(step).ids_T.tolist() == [60, 50]


@pytest.mark.parametrize("chunk", [(0, 2, 2, True), (0, 0, 2, True)], ids=["token not known", "samples too early"])
def test_a_plan_that_does_not_fit_the_rows_is_our_bug(chunk: tuple[int, int, int, bool]) -> None:
    rows = BatchRows(max_num_seqs=1, max_model_len=8, block_size=4)
    step = plan([chunk], starts=(start(0, [1, 2, 3]),))
    rows.apply(step)
    with pytest.raises(AssertionError):
        rows.prepare(step)


def test_inputs_of_a_step_stay_when_the_next_is_prepared() -> None:
    """A lowering borrows the arrays until its pass is done; a reused buffer changes them under it."""
    rows = BatchRows(max_num_seqs=2, max_model_len=8, block_size=4)
    first = plan([(0, 0, 3, True)], starts=(start(0, [1, 2, 3]),))
    rows.apply(first)
    inputs = rows.prepare(first)
    before = {name: np.copy(getattr(inputs, name)) for name in inputs.__dataclass_fields__}
    rows.append(np.array([0], np.int32), np.array([9], np.int32))
    second = plan([(0, 3, 1, True), (1, 0, 1, True)], starts=(start(1, [7]),), table=((0, 0, 4), (1, 0, 2)))
    rows.apply(second)
    rows.prepare(second)
    for name, value in before.items():
        assert np.array_equal(getattr(inputs, name), value), name


def test_successive_decode_steps_share_what_did_not_change_and_nothing_else() -> None:
    """A layout kept too long sends a row to blocks that are no longer its own."""
    rows = BatchRows(max_num_seqs=3, max_model_len=12, block_size=4)
    begun = plan([], starts=(start(0, [1, 2, 3]), start(2, [5])), table=((0, 0, 8), (2, 0, 6), (1, 0, 7)))
    rows.apply(begun)
    running = np.array([0, 2], np.int32)
    running.flags.writeable = False

    def decode(positions: list[int], table: tuple[tuple[int, int, int], ...] = ()) -> StepInputs:
        step = replace(plan([(0, positions[0], 1, True), (2, positions[1], 1, True)], table=table), rows=running)
        if not table:
            step = replace(step, table_rows=None, table_columns=None, table_blocks=None)
        rows.apply(step)
        inputs = rows.prepare(step)
        rows.append(running, np.array([90, 91], np.int32))
        return inputs

    first, second = decode([2, 0]), decode([3, 1])
    assert first.block_indices_N.tolist() == [8, 6] and second.ids_T.tolist() == [90, 91]
    assert second.block_indices_N is first.block_indices_N and second.take_L is first.take_L
    third = decode([4, 2], table=((0, 1, 3),))
    assert third.block_indices_N.tolist() == [8, 3, 6] and third.block_begins.tolist() == [0, 2, 3]
    fourth = decode([5, 3], table=((2, 0, 9),))
    assert fourth.block_indices_N.tolist() == [8, 3, 9]
    rows.tables_RB[2, 1] = 11  # a table that was long enough before
    assert decode([6, 4]).block_indices_N.tolist() == [8, 3, 9, 11]
    assert third.block_indices_N.tolist() == [8, 3, 6]
