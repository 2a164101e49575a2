"""Weighted fair sharing keeps the bound that virtual token counters promise."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from steady import Steady

from pageflight.core.tenants import Tenants, TenantShare
from pageflight.sched.fair_share import INPUT_COST, OUTPUT_COST

MAX_PROMPT, MAX_OUTPUT = 24, 12


def shares(**weights: float) -> Tenants:
    return Tenants(by_name={name: TenantShare(weight=weight) for name, weight in weights.items()})


def service(steady: Steady, tenant: str) -> float:
    return INPUT_COST * steady.prompt_tokens[tenant] + OUTPUT_COST * steady.output_tokens[tenant]


@dataclass
class Spread:
    """The widest difference of what a pair of tenants was served, by weight, over any interval."""

    lowest: float = 0.0
    highest: float = 0.0

    def add(self, difference: float) -> None:
        self.lowest, self.highest = min(self.lowest, difference), max(self.highest, difference)

    @property
    def width(self) -> float:
        return self.highest - self.lowest


def bound(max_num_seqs: int, *weights: float) -> float:
    """2 U of the paper's theorem 4.4, with the most tokens that a batch can hold."""
    num_tokens = max_num_seqs * (MAX_PROMPT + MAX_OUTPUT)
    return 2 * max(INPUT_COST * MAX_PROMPT, OUTPUT_COST * num_tokens) / min(weights)


def backlogged(steady: Steady, sizes: dict[str, tuple[int, int]], num_steps: int) -> Spread:
    """Tenants a and b always have something waiting; `sizes` are their requests' prompt and output lengths."""
    spread, weights = Spread(), {name: steady.config.tenants.share_of(name).weight for name in sizes}
    for _ in range(num_steps):
        for name, (num_prompt, num_output) in sizes.items():
            num_waiting = steady.scheduler._batch.tenants.named(name).num_waiting
            for _ in range(steady.config.max_num_seqs + 1 - num_waiting):  # a step must not start all of them
                steady.submit(num_prompt, num_output, tenant=name)
        steady.step()
        spread.add(service(steady, "a") / weights["a"] - service(steady, "b") / weights["b"])
    return spread


@settings(max_examples=30, deadline=None)
@given(
    weights=st.tuples(st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([0.5, 1.0, 3.0])),
    sizes=st.lists(st.tuples(st.integers(1, MAX_PROMPT), st.integers(1, MAX_OUTPUT)), min_size=2, max_size=2),
    max_num_seqs=st.integers(1, 4),
    num_blocks=st.sampled_from([12, 60]),
)
def test_backlogged_tenants_get_their_shares_within_the_bound(
    weights: tuple[float, float], sizes: list[tuple[int, int]], max_num_seqs: int, num_blocks: int
) -> None:
    """Any lengths, any weights, with and without preemption: over no interval is one ahead by more than the theorem
    allows."""
    steady = Steady(
        scheduling_policy="fair",
        tenants=shares(a=weights[0], b=weights[1]),
        max_num_seqs=max_num_seqs,
        max_num_tokens=32,
        num_blocks=num_blocks,
    )
    spread = backlogged(steady, {"a": sizes[0], "b": sizes[1]}, 300)
    assert spread.width <= bound(max_num_seqs, *weights)


@pytest.mark.parametrize(("policy", "is_fair"), [("fair", True), ("fcfs", False), ("priority", False)])
def test_only_fair_keeps_a_tenant_with_long_requests_from_taking_more(policy: str, is_fair: bool) -> None:
    """The bound is no luck: under the other policies the same load breaks it many times over."""
    steady = Steady(scheduling_policy=policy, tenants=shares(a=1.0, b=1.0), max_num_seqs=4, max_num_tokens=32)
    spread = backlogged(steady, {"a": (MAX_PROMPT, MAX_OUTPUT), "b": (2, 2)}, 400)
    assert (spread.width <= bound(4, 1.0)) == is_fair
    if not is_fair:
        assert spread.width > 4 * bound(4, 1.0)


def test_three_times_the_weight_is_three_times_the_service() -> None:
    steady = Steady(scheduling_policy="fair", tenants=shares(a=3.0, b=1.0), max_num_seqs=4, max_num_tokens=32)
    backlogged(steady, {"a": (8, 8), "b": (8, 8)}, 600)
    assert service(steady, "a") / service(steady, "b") == pytest.approx(3.0, rel=0.05)


def test_a_tenant_that_was_away_has_no_claim_on_what_it_did_not_use() -> None:
    """It came back with a counter from long ago and shut the others out until it had caught up."""
    steady = Steady(scheduling_policy="fair", max_num_seqs=2, max_num_tokens=32)
    steady.submit(2, 2, tenant="b")
    for _ in range(600):
        while steady.scheduler.num_waiting < 3:
            steady.submit(8, 8, tenant="a")
        steady.step()
    before = {name: service(steady, name) for name in "ab"}
    assert before["a"] > 10 * bound(2, 1.0)
    backlogged(steady, {"a": (8, 8), "b": (8, 8)}, 200)
    gained = {name: service(steady, name) - before[name] for name in "ab"}
    assert abs(gained["a"] - gained["b"]) <= bound(2, 1.0)


def test_a_tenant_alone_gets_everything() -> None:
    """Work conservation: a share that nobody asks for is not kept free."""
    steady = Steady(scheduling_policy="fair", tenants=shares(a=0.5, b=100.0), max_num_seqs=4, max_num_tokens=32)
    for _ in range(12):
        steady.submit(4, 6, tenant="a")
    steady.step()
    assert steady.scheduler.stats().num_running == 4


def test_priority_counts_inside_a_tenant_and_not_between_tenants() -> None:
    """One tenant marked all its requests urgent and got all rows."""
    steady = Steady(scheduling_policy="fair", max_num_seqs=1, max_num_tokens=32)
    modest = [steady.submit(4, 4, tenant="a") for _ in range(4)]
    urgent = [steady.submit(4, 4, tenant="b", priority=9) for _ in range(3)]
    most = steady.submit(4, 4, tenant="b", priority=10)
    while steady.scheduler.has_work:
        steady.step()
    order = sorted(steady.started, key=steady.started.__getitem__)
    assert order == [modest[0], most, modest[1], urgent[0], modest[2], urgent[1], modest[3], urgent[2]]


def test_the_tenant_most_above_its_share_is_preempted() -> None:
    """The youngest sequence lost its row, though its tenant had had almost nothing."""
    steady = Steady(scheduling_policy="fair", max_num_seqs=4, num_blocks=16, max_num_tokens=32, kv_watermark=0.0)
    rich = [steady.submit(12, 30, tenant="rich") for _ in range(2)]
    for _ in range(8):
        steady.step()
    poor = steady.submit(4, 20, tenant="poor")
    while not steady.scheduler.stats().preemptions:
        steady.step()
    assert poor in steady.started and poor not in steady.ended
    batch = steady.scheduler._batch
    assert [s.handle for s in batch.open.values() if s.is_preempted] == [rich[1]]


def test_tenants_that_have_gone_are_forgotten() -> None:
    """Every name that a client made up stayed in memory for ever."""
    for policy in ("fair", "priority"):
        steady = Steady(scheduling_policy=policy, max_num_seqs=2)
        for number in range(1000):
            steady.submit(3, 2, tenant=f"tenant {number}")
            while steady.scheduler.has_work:
                steady.step()
        assert len(list(steady.scheduler._batch.tenants)) < 200
