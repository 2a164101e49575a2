"""Prompt chunks that hold a target time between tokens, on a simulated clock with a simulated engine."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from steady import Steady

from pageflight.core.plan import StepPlan
from pageflight.sched.pacing import Budget, TimedBudget, in_tiles, num_pairs
from pageflight.sched.step_time import Load, StepCosts, StepTime

TARGET_MS = 100.0
NUM_STREAMS = 16
COSTS = StepCosts(step_s=4e-3, row_s=1e-4, position_s=1.5e-6, token_s=2e-4, pair_s=1.2e-7)


@dataclass
class Run:
    """Streams that always run, and 4,000-token prompts that come every two seconds."""

    gaps_ms: list[float] = field(default_factory=list)
    num_prompts: int = 0
    num_prompts_done: int = 0

    def percentile(self, share: float) -> float:
        return float(np.percentile(self.gaps_ms, share))


def load_of(plan: StepPlan, tile: int) -> Load:
    is_chunk = plan.lengths > 1
    pairs = sum(map(num_pairs, plan.starts_at[is_chunk].tolist(), plan.lengths[is_chunk].tolist()))
    num_positions = int((plan.starts_at[~is_chunk] + 1).sum())
    return Load(int((~is_chunk).sum()), num_positions, in_tiles(plan.num_tokens, tile), pairs)


def simulate(target_ms: float, *, tile: int = 1, seconds: float = 40.0, slower: float = 1.0) -> Run:
    """An engine with these costs, disturbed by chance; in the second half everything takes `slower` times as long."""
    run, chance = Run(), random.Random(7)
    steady = Steady(
        num_blocks=2000, block_size=32, max_model_len=6000, max_num_seqs=32, max_num_tokens=256, token_tile=tile,
        target_inter_token_ms=target_ms,
    )  # fmt: skip
    streams: set[int] = set()
    prompts: set[int] = set()
    last_s: dict[int, float] = {}
    next_prompt_s = 4.0
    while steady.now_s < seconds:
        while len(streams) < NUM_STREAMS:
            streams.add(steady.submit(100, 150))
        if steady.now_s >= next_prompt_s and steady.now_s < seconds - 10:
            prompts.add(steady.submit(4000, 8))
            next_prompt_s += 4.0
        plan = steady.plan()
        assert plan is not None
        step_s = COSTS.of(load_of(plan, tile)) * chance.lognormvariate(0, 0.05)
        steady.now_s += step_s * (slower if steady.now_s > seconds / 2 else 1.0)
        events = steady.settle(plan)
        for handle in streams & set(events.handles.tolist()):
            if handle in last_s and steady.now_s > 2.0:
                run.gaps_ms.append(1000 * (steady.now_s - last_s[handle]))
            last_s[handle] = steady.now_s
        streams -= {ending.handle for ending in events.finished}
    run.num_prompts = len(prompts)
    run.num_prompts_done = sum(handle in steady.ended for handle in prompts)
    return run


@pytest.mark.parametrize("tile", [1, 64])
def test_streams_keep_their_pace_while_long_prompts_come_in(tile: int) -> None:
    """Without a target a 4,000-token prompt held every stream up; with one it is computed in smaller chunks."""
    free, held = simulate(0.0, tile=tile), simulate(TARGET_MS, tile=tile)
    assert free.percentile(99) > 1.5 * TARGET_MS
    assert held.percentile(99) <= TARGET_MS
    assert held.num_prompts >= 6 and held.num_prompts_done == held.num_prompts


def test_the_time_there_is_gets_used() -> None:
    """A controller that always took the smallest chunk would hold any target, and answer no prompt for minutes."""
    run = simulate(TARGET_MS)
    with_chunks = [gap_ms for gap_ms in run.gaps_ms if gap_ms > 30]  # decoding alone takes half of that
    assert float(np.median(with_chunks)) > 0.6 * TARGET_MS


def test_an_engine_that_becomes_slower_is_noticed() -> None:
    """What was learnt on a quiet machine broke the target for good when it got busy."""
    run = simulate(TARGET_MS, slower=1.6)
    late = run.gaps_ms[len(run.gaps_ms) * 3 // 4 :]
    assert float(np.percentile(late, 99)) <= TARGET_MS


def test_a_target_that_cannot_be_held_does_not_starve_prompts() -> None:
    """Decoding alone takes longer than this target; prompts waited until all streams had ended."""
    run = simulate(2.0, tile=64, seconds=60.0)
    assert run.num_prompts_done == run.num_prompts


def test_a_step_without_streams_takes_the_whole_budget() -> None:
    steady = Steady(max_num_seqs=4, max_num_tokens=64, target_inter_token_ms=1.0)
    steady.submit(200, 2)
    plan = steady.step(5.0)
    assert plan is not None and plan.lengths.tolist() == [64]


def test_the_first_chunk_fills_its_tile_and_later_ones_keep_to_the_time() -> None:
    costs = StepCosts(0.0, 0.0, 0.0, token_s=1e-3, pair_s=0.0)
    late = TimedBudget(500, num_decoding=16, tile=64, left_s=-1.0, costs=costs)
    assert late.take(0, 400) == 48 and late.is_spent
    almost_full = TimedBudget(500, num_decoding=60, tile=64, left_s=0.0, costs=costs)
    assert almost_full.take(0, 400) == 68, "four tokens would have been hardly any progress"
    in_time = TimedBudget(500, num_decoding=64, tile=64, left_s=0.13, costs=costs)
    assert in_time.take(0, 400) == 128 and in_time.is_spent
    unknown = TimedBudget(500, num_decoding=8, tile=1, left_s=0.0, costs=None)
    assert unknown.take(0, 400) == 16 and unknown.is_spent
    assert Budget(30).take(0, 400) == 30


def test_a_chunk_far_into_its_prompt_is_smaller() -> None:
    """Attention over 4,000 tokens was not counted, and the last chunks of a prompt took three times the target."""
    costs = StepCosts(0.0, 0.0, 0.0, token_s=1e-4, pair_s=1e-7)
    lengths = []
    for start in (0, 2000, 4000):
        budget = TimedBudget(256, num_decoding=4, tile=1, left_s=0.02, costs=costs)
        lengths.append(length := budget.take(start, 5000))
        used_s = [1e-4 * n + 1e-7 * num_pairs(start, n) for n in (length, length + 2)]
        assert used_s[0] <= 0.02 < used_s[1]
    assert lengths[0] > lengths[1] > lengths[2]


def random_load(chance: random.Random) -> Load:
    num_rows, num_chunk = chance.randrange(1, 32), chance.choice((0, 0, 16, 64, 200))
    pairs = num_pairs(chance.randrange(4000), num_chunk) if num_chunk else 0.0
    return Load(num_rows, num_rows * chance.randrange(50, 900), num_rows + num_chunk, pairs)


def test_costs_are_found_from_the_times_of_steps_in_spite_of_disturbances() -> None:
    """One step in fifty takes ten times as long: something else had the cores."""
    chance, model = random.Random(3), StepTime()
    for _ in range(400):
        load = random_load(chance)
        disturbed = 10.0 if chance.random() < 0.02 else 1.0
        model.note(load, COSTS.of(load) * chance.lognormvariate(0, 0.03) * disturbed)
        model.costs()
    costs = model.costs()
    assert costs is not None
    errors = [abs(costs.of(load) / COSTS.of(load) - 1) for load in (random_load(chance) for _ in range(200))]
    assert float(np.percentile(errors, 95)) < 0.15
    assert all(cost >= 0 for cost in costs) and 1.0 <= model.margin() <= 2.0


def test_the_same_times_give_the_same_plans() -> None:
    """A recorded run must replay, whatever was learnt on the way."""
    assert simulate(TARGET_MS, seconds=12.0).gaps_ms == simulate(TARGET_MS, seconds=12.0).gaps_ms
