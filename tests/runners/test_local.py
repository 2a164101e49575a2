from __future__ import annotations

import numpy as np
import pytest
from toy_model import ToyModel

from pageflight.core.errors import ConfigError
from pageflight.core.plan import RowStart, StepPlan
from pageflight.core.request import SamplingParams
from pageflight.runners.local import LocalRunner

GREEDY = SamplingParams()


def step(
    runner: LocalRunner,
    chunks: list[tuple[int, int, int, bool]],
    *,
    starts: tuple[RowStart, ...] = (),
    ended: tuple[int, ...] = (),
    table: tuple[tuple[int, int, int], ...] = (),
    copies: tuple[tuple[int, int], ...] = (),
    outs: tuple[tuple[int, int], ...] = (),
    ins: tuple[tuple[int, int], ...] = (),
) -> list[int]:
    columns = np.array(chunks, np.int64).reshape(-1, 4).T
    updates, moves = np.array(table, np.int32).reshape(-1, 3).T, np.array(copies, np.int32).reshape(-1, 2).T
    leaving, coming = np.array(outs, np.int32).reshape(-1, 2).T, np.array(ins, np.int32).reshape(-1, 2).T
    plan = StepPlan(
        step=7,
        rows=columns[0].astype(np.int32),
        starts_at=columns[1].astype(np.int32),
        lengths=columns[2].astype(np.int32),
        samples=columns[3].astype(np.bool_),
        starts=starts,
        ended_rows=ended,
        table_rows=updates[0] if table else None,
        table_columns=updates[1] if table else None,
        table_blocks=updates[2] if table else None,
        copy_sources=moves[0] if copies else None,
        copy_targets=moves[1] if copies else None,
        copy_out_blocks=leaving[0] if outs else None,
        copy_out_slots=leaving[1] if outs else None,
        copy_in_slots=coming[0] if ins else None,
        copy_in_blocks=coming[1] if ins else None,
    )
    runner.submit(plan)
    result = runner.collect()
    assert result.step == 7 and result.sampled_ids.dtype == np.int32
    return result.sampled_ids.tolist()


def start(row: int, ids: list[int], num_prompt: int, index: int = 0, sampling: SamplingParams = GREEDY) -> RowStart:
    return RowStart(row, row, index, np.array(ids, np.int32), num_prompt, sampling)


def runner_on(model: ToyModel) -> LocalRunner:
    return LocalRunner(model, num_blocks=12, max_num_seqs=3, max_model_len=16)


def test_chunked_prefill_beside_decode_gives_what_each_row_gives_alone() -> None:
    model = ToyModel()
    runner = runner_on(model)
    first, second = [5, 6, 7, 8, 9, 10], [20, 21, 22]
    assert step(runner, [(2, 0, 4, False)], starts=(start(2, first, 6),), table=((2, 0, 11), (2, 1, 3))) == []
    got = step(runner, [(2, 4, 2, True), (0, 0, 3, True)], starts=(start(0, second, 3),), table=((0, 0, 1),))
    texts = {2: [got[0]], 0: [got[1]]}
    for number in range(4):
        table = ((0, 1, 8),) if number == 1 else ((2, 2, 5),) if number == 2 else ()
        got = step(runner, [(0, 3 + number, 1, True), (2, 6 + number, 1, True)], table=table)
        texts[0].append(got[0])
        texts[2].append(got[1])
    assert texts == {2: model.continuation(first, 5), 0: model.continuation(second, 5)}


def test_a_fork_copies_the_last_block_and_samples_its_own_token() -> None:
    model = ToyModel()
    runner = runner_on(model)
    prompt = [1, 2, 3, 4, 5, 6]
    params = SamplingParams(temperature=1.0, seed=5)
    leader = step(runner, [(0, 0, 6, True)], starts=(start(0, prompt, 6, 0, params),), table=((0, 0, 2), (0, 1, 4)))
    both = step(
        runner,
        [(0, 6, 1, True), (1, 5, 1, True)],
        starts=(start(1, prompt, 6, 1, params),),
        table=((1, 0, 2), (1, 1, 9)),
        copies=((4, 9),),
    )
    alone = LocalRunner(ToyModel(), num_blocks=12, max_num_seqs=3, max_model_len=16)
    sibling = step(alone, [(0, 0, 6, True)], starts=(start(0, prompt, 6, 1, params),), table=((0, 0, 0), (0, 1, 1)))
    assert both[1] == sibling[0] != leader[0]
    assert model.blocks[4, 2] == leader[0] and model.blocks[9, 2] == -1  # the leader's token stays its own


def test_a_preempted_row_resumes_with_its_output_as_if_nothing_had_happened() -> None:
    model = ToyModel()
    runner = runner_on(model)
    params = SamplingParams(temperature=1.0, seed=5, frequency_penalty=2.0)
    prompt = [3, 1, 4]
    expected = step(runner, [(0, 0, 3, True)], starts=(start(0, prompt, 3, 0, params),), table=((0, 0, 0), (0, 1, 1)))
    for position in (3, 4):
        expected += step(runner, [(0, position, 1, True)])
    known = prompt + expected[:1]
    table = ((1, 0, 6), (1, 1, 7))
    again = step(runner, [(1, 0, 4, True)], starts=(start(1, known, 3, 0, params),), ended=(0,), table=table)
    again += step(runner, [(1, 4, 1, True)])
    assert again == expected[1:]


def test_copies_go_out_before_they_come_in_and_both_before_those_between_blocks() -> None:
    """In one step a block leaves, is fetched back to another place, and from there copied for a fork."""
    model = ToyModel()
    runner = LocalRunner(model, num_blocks=12, max_num_seqs=3, max_model_len=16, num_host_blocks=4)
    prompt = [3, 1, 4, 1, 5]
    expected = step(runner, [(0, 0, 5, True)], starts=(start(0, prompt, 5),), table=((0, 0, 2), (0, 1, 3)))
    got = step(
        runner,
        [(1, 4, 1, True), (2, 4, 1, True)],
        starts=(start(1, prompt, 5), start(2, prompt, 5)),
        ended=(0,),
        table=((1, 0, 7), (1, 1, 8), (2, 0, 9), (2, 1, 10)),
        outs=((2, 3), (3, 1)),
        ins=((3, 7), (1, 8)),
        copies=((7, 9), (8, 10)),
    )
    assert got == expected * 2
    assert runner.limits.num_host_blocks == 4 and runner.limits.host_copy_s > 0
    assert runner_on(ToyModel()).limits.host_copy_s == 0


def test_a_plan_without_rows_only_changes_state() -> None:
    runner = runner_on(ToyModel())
    assert step(runner, [], starts=(start(0, [1, 2], 2),), table=((0, 0, 3),)) == []
    assert len(step(runner, [(0, 0, 2, True)])) == 1
    assert step(runner, [], ended=(0,)) == []


def test_log_probs_come_only_when_a_row_of_the_step_asks() -> None:
    runner = runner_on(ToyModel())
    asking = SamplingParams(log_probs=True)
    starts = (start(0, [1, 2], 2), start(1, [1, 2], 2, 0, asking))
    plan = StepPlan(
        step=0,
        rows=np.array([0, 1], np.int32),
        starts_at=np.zeros(2, np.int32),
        lengths=np.full(2, 2, np.int32),
        samples=np.array([True, True]),
        starts=starts,
        table_rows=np.array([0, 1], np.int32),
        table_columns=np.zeros(2, np.int32),
        table_blocks=np.array([0, 1], np.int32),
    )
    runner.submit(plan)
    log_probs = runner.collect().log_probs
    assert log_probs is not None and np.isnan(log_probs[0]) and log_probs[1] < 0


def test_limits_say_what_the_model_has_and_the_caller_chose() -> None:
    model = ToyModel(vocab_size=31, block_size=8)
    limits = LocalRunner(model, num_blocks=5, max_num_seqs=2, max_model_len=40).limits
    assert (limits.num_blocks, limits.block_size, limits.max_num_seqs) == (5, 8, 2)
    assert (limits.max_model_len, limits.vocab_size) == (40, 31)
    assert model.blocks.shape == (5, 8)


@pytest.mark.parametrize("name", ["num_blocks", "max_num_seqs", "max_model_len"])
def test_a_limit_below_one_is_named(name: str) -> None:
    options = {"num_blocks": 4, "max_num_seqs": 1, "max_model_len": 8, name: 0}
    with pytest.raises(ConfigError, match=f"{name}=0"):
        LocalRunner(ToyModel(), **options)


def test_close_closes_the_model() -> None:
    model = ToyModel()
    runner_on(model).close()
    assert model.closed
