"""Who is served first: `fcfs`, `priority` with ageing, and what no policy may do."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sched_harness import Harness
from steady import Steady

from pageflight.core.config import SchedulerConfig
from pageflight.core.errors import ConfigError

POLICIES = ("fcfs", "priority", "fair")


def test_fcfs_ignores_priorities() -> None:
    harness = Harness(max_num_seqs=1, scheduling_policy="fcfs")
    handles = [harness.submit([1, 2], max_tokens=1, priority=priority) for priority in (0, 2, 0, 2, 1)]
    harness.run()
    assert harness.starts == handles


def test_fcfs_goes_by_arrival_even_where_requests_came_in_another_order() -> None:
    """After a restart of the core the front sent the open requests again, and the oldest had become the youngest."""
    steady = Steady(max_num_seqs=1, scheduling_policy="fcfs")
    steady.now_s = 10.0
    late = steady.submit(2, 1)
    steady.now_s = 5.0  # this one had arrived before
    early = steady.submit(2, 1)
    steady.now_s = 11.0
    while steady.scheduler.has_work:
        steady.step()
    assert steady.started[early] < steady.started[late]


def test_waiting_is_worth_a_level_of_priority_every_ageing_seconds() -> None:
    """Requests of low priority waited as long as any of higher priority came."""
    for ageing_s, first in ((10.0, "low"), (30.0, "high"), (0.0, "high")):
        steady = Steady(max_num_seqs=1, ageing_s=ageing_s)
        running = steady.submit(2, 21)
        steady.step()
        low = steady.submit(2, 1, priority=0)
        for _ in range(20):
            steady.step()
        assert running in steady.ended and low not in steady.started
        high = steady.submit(2, 1, priority=1)
        steady.step()
        assert ({"low": low, "high": high}[first] in steady.started) and len(steady.started) == 2


def test_without_ageing_the_lower_priority_waits_for_ever() -> None:
    """What ageing is for; with it the same load serves everyone."""
    waited_s = {ageing_s: _longest_wait_of_low_priority(ageing_s) for ageing_s in (0.0, 5.0)}
    assert waited_s[0.0] is None and waited_s[5.0] is not None


def _longest_wait_of_low_priority(ageing_s: float) -> float | None:
    steady = Steady(max_num_seqs=2, ageing_s=ageing_s)
    low = steady.submit(4, 4, priority=0)
    for _ in range(2):
        steady.submit(4, 4, priority=3)
    for _ in range(200):
        while steady.scheduler.num_waiting < 3:
            steady.submit(4, 4, priority=3)
        steady.step()
    return steady.started.get(low)


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    ageing_s=st.sampled_from([1.0, 4.0]),
    max_num_seqs=st.integers(1, 4),
    policy=st.sampled_from(["priority", "fair"]),
)
def test_with_ageing_nothing_waits_longer_than_its_priority_explains(
    data: st.DataObject, ageing_s: float, max_num_seqs: int, policy: str
) -> None:
    """A sequence is overtaken only by those that arrived less than (their priority − its own) × ageing later.

    So what can come before it is finite, however long the flood of higher priorities lasts.
    """
    steady = Steady(max_num_seqs=max_num_seqs, ageing_s=ageing_s, scheduling_policy=policy)
    priorities = data.draw(st.lists(st.integers(-2, 3), min_size=60, max_size=60))
    for priority in priorities:
        while steady.scheduler.num_waiting < 4:
            steady.submit(3, 3, priority=priority)
        steady.step()
    while steady.scheduler.has_work:
        steady.step()
    assert len(steady.started) == len(steady.requests)
    for handle, one in steady.requests.items():
        for overtaken, other in steady.requests.items():
            if other.arrival_s <= steady.started[handle] < steady.started[overtaken]:
                assert one.arrival_s - other.arrival_s <= (one.priority - other.priority) * ageing_s


@pytest.mark.parametrize("policy", POLICIES)
def test_a_request_that_cannot_start_before_its_deadline_is_ended(policy: str) -> None:
    steady = Steady(max_num_seqs=1, scheduling_policy=policy)
    steady.submit(2, 20)
    late = steady.submit(2, 2, deadline_s=5.0, tenant="other")
    for _ in range(10):
        steady.step()
    assert steady.ended[late] == "deadline" and late not in steady.started


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gives_every_sequence_the_tokens_it_has_alone(policy: str) -> None:
    """With a cache far too small, so that sequences are preempted again and again."""
    harness = Harness(block_size=2, num_blocks=14, max_num_seqs=4, max_num_tokens=8, scheduling_policy=policy)
    for index in range(12):
        harness.submit([index % 13] * 10, max_tokens=12, tenant="ab"[index % 2], priority=index % 3, n=1 + index % 2)
    harness.run(max_steps=3000)
    harness.verify()
    assert harness.scheduler.stats().preemptions > 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scheduling_policy", "lottery"),
        ("kv_admission", "maybe"),
        ("ageing_s", -1.0),
        ("ageing_s", float("nan")),
        ("kv_watermark", 1.0),
        ("max_queue_tokens", -1),
        ("target_inter_token_ms", float("inf")),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        SchedulerConfig(**{name: value})  # type: ignore[arg-type]
