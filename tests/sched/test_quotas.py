"""Quotas by tenant: never exceeded, nobody else held up, changed while running; and limits of the whole queue."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sched_harness import Harness
from steady import Steady

from pageflight.core.errors import ConfigError, PromptTooLong, QueueFull
from pageflight.core.tenants import Tenants, TenantShare, parse_tenants

POLICIES = st.sampled_from(["fcfs", "priority", "fair"])


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    policy=POLICIES,
    max_running=st.integers(1, 3),
    max_waiting=st.integers(0, 4),
    kv_share=st.sampled_from([0.25, 0.5]),
)
def test_quotas_are_never_exceeded_and_hold_nobody_up(
    data: st.DataObject, policy: str, max_running: int, max_waiting: int, kv_share: float
) -> None:
    """Tenant a has quotas, b has none; whatever arrives, and whoever is preempted."""
    share = TenantShare(max_running=max_running, max_waiting=max_waiting, kv_share=kv_share)
    harness = Harness(
        block_size=2, num_blocks=24, max_num_seqs=4, scheduling_policy=policy, tenants=Tenants(by_name={"a": share})
    )
    batch = harness.scheduler._batch
    budget = int(kv_share * 24)
    arrivals = data.draw(st.lists(st.tuples(st.sampled_from("aab"), st.integers(1, 9), st.integers(1, 8)), max_size=30))
    for name, num_prompt, num_output in arrivals:
        try:
            harness.submit([1] * num_prompt, max_tokens=num_output, tenant=name)
        except QueueFull as error:
            a = batch.tenants.named("a")
            assert error.tenant == name == "a" and a.num_open - a.num_running >= max_waiting
        except PromptTooLong:
            assert name == "a" and num_prompt + num_output - 1 > 2 * budget
        num_free = batch.rows.num_free
        harness.step()
        for tenant in batch.tenants:
            if tenant.name == "a":
                running = [s for s in batch.open.values() if s.tenant is tenant and s.row >= 0]
                assert len(running) <= max_running
                assert sum(len(batch.rows.blocks(s.row)) for s in running) <= budget
        b_waits = any(s.row < 0 for s in batch.open.values() if s.tenant.name == "b")
        assert not (b_waits and num_free == 4), "b waited for a tenant at its quota while nothing ran"
    harness.run()
    harness.verify()


def test_a_tenant_at_its_quota_lets_others_pass_and_goes_on_when_a_row_of_its_own_is_free() -> None:
    """The first of the line could not start, so nobody behind it did, with rows standing empty."""
    for policy in ("fcfs", "priority", "fair"):
        shares = Tenants(by_name={"a": TenantShare(max_running=1)})
        harness = Harness(max_num_seqs=4, scheduling_policy=policy, tenants=shares)
        first, second = (harness.submit([1, 2], max_tokens=4, tenant="a") for _ in range(2))
        other = harness.submit([3, 4], max_tokens=9, tenant="b")
        harness.step()
        assert harness.starts == [first, other]
        harness.run()
        assert harness.starts == [first, other, second] and second in harness.finished


def test_a_forked_sequence_counts_in_the_quota_of_its_tenant() -> None:
    """One request with n=4 took four rows of a tenant that may have two."""
    shares = Tenants(default=TenantShare(max_running=2))
    harness = Harness(max_num_seqs=4, tenants=shares)
    harness.submit([1, 2, 3], n=4, temperature=1.0, max_tokens=4)
    while harness.scheduler.has_work:
        harness.step()
        assert harness.scheduler.stats().num_running <= 2
    harness.run()
    harness.verify()


def test_the_queue_limit_of_a_tenant_names_it_and_does_not_count_what_a_free_row_awaits() -> None:
    shares = Tenants(by_name={"a": TenantShare(max_waiting=1)})
    harness = Harness(max_num_seqs=2, tenants=shares)
    for _ in range(3):
        harness.submit([1, 2], max_tokens=3, tenant="a")
    with pytest.raises(QueueFull, match=re.escape("queue of tenant 'a' is full: 1 requests waiting, limit 1")):
        harness.submit([1, 2], max_tokens=3, tenant="a")
    harness.submit([1, 2], max_tokens=3, tenant="b")
    harness.run()


def test_what_the_budget_of_a_tenant_can_never_hold_is_refused_at_once() -> None:
    """It would have waited for ever."""
    shares = Tenants(by_name={"a": TenantShare(kv_share=0.25)})
    harness = Harness(block_size=4, num_blocks=16, tenants=shares)
    harness.submit([1] * 10, max_tokens=7, tenant="a")
    with pytest.raises(PromptTooLong, match=r"max_tokens=8: prompt and answer hold at most 17 tokens .* tenant 'a'"):
        harness.submit([1] * 10, max_tokens=8, tenant="a")
    harness.submit([1] * 10, max_tokens=8, tenant="b")
    harness.run()


def test_other_shares_count_at_once_and_what_was_accepted_is_still_served() -> None:
    """A smaller budget left sequences waiting that could never start again."""
    harness = Harness(block_size=4, num_blocks=16, max_num_seqs=4)
    large = [harness.submit([1] * 20, max_tokens=20, tenant="a") for _ in range(3)]
    harness.step()
    harness.scheduler.set_tenants(Tenants(default=TenantShare(kv_share=0.1, max_running=1)))
    harness.run()
    harness.verify()
    assert all(harness.finished[handle].reason == "length" for handle in large)
    harness.scheduler.set_tenants(Tenants())
    for _ in range(3):
        harness.submit([1, 2], max_tokens=9, tenant="a")
    harness.step()
    assert harness.scheduler.stats().num_running == 3


def test_a_new_weight_changes_what_is_served_from_then_on() -> None:
    def shares(weight: float) -> Tenants:
        return Tenants(by_name={"a": TenantShare(weight=weight)})

    steady = Steady(scheduling_policy="fair", max_num_seqs=4, max_num_tokens=32, tenants=shares(1.0))
    for weight in (1.0, 4.0):
        steady.scheduler.set_tenants(shares(weight))
        before = dict(steady.output_tokens)
        for _ in range(400):
            for name in "ab":
                while steady.scheduler._batch.tenants.named(name).num_waiting < 5:
                    steady.submit(4, 6, tenant=name)
            steady.step()
        gained = {name: steady.output_tokens[name] - before.get(name, 0) for name in "ab"}
        assert gained["a"] / gained["b"] == pytest.approx(weight, rel=0.1)


# ---- the queue as a whole


def test_prompt_tokens_that_wait_have_a_limit() -> None:
    """A thousand requests of four tokens and a thousand of four thousand were the same to the limit."""
    harness = Harness(max_num_seqs=1, max_queue_tokens=20)
    harness.submit([1] * 30, max_tokens=2)  # larger than the limit: taken as long as nothing waits
    harness.step()
    harness.submit([1] * 12, max_tokens=2)
    harness.submit([1] * 8, max_tokens=2)
    with pytest.raises(QueueFull, match="20 prompt tokens waiting in 2 requests, limit 20 tokens; retry later"):
        harness.submit([1], max_tokens=2)
    harness.run()
    assert harness.scheduler.stats().num_waiting_tokens == 0


def test_a_refusal_tells_the_estimated_wait_once_something_was_measured() -> None:
    steady = Steady(max_num_seqs=1, max_queue_size=4)
    for _ in range(5):
        steady.submit(10, 5)
    with pytest.raises(QueueFull) as caught:
        steady.submit(10, 5)
    assert caught.value.wait_s is None and "estimated" not in str(caught.value)
    for _ in range(102):
        while steady.scheduler.num_waiting < 4:
            steady.submit(10, 5)
        steady.step(0.5)
    with pytest.raises(QueueFull) as caught:
        steady.submit(10, 5)
    assert caught.value.num_tokens == 40
    # Each request takes 5 steps of half a second, one at a time; four of them wait.
    assert caught.value.wait_s == pytest.approx(10.0, rel=0.15)
    assert f"estimated wait {caught.value.wait_s:.1f} s" in str(caught.value)
    assert steady.scheduler.stats().queue_wait_s == caught.value.wait_s


def test_time_without_a_queue_does_not_make_the_estimate_longer() -> None:
    """After a quiet night the first burst was told to come back tomorrow."""
    steady = Steady(max_num_seqs=1, max_queue_size=4)
    for quiet_s in (0.0, 100_000.0):
        steady.now_s += quiet_s
        for _ in range(60):
            while steady.scheduler.num_waiting < 4:
                steady.submit(10, 5)
            steady.step(0.5)
        waits_s = steady.scheduler.stats().queue_wait_s
        assert waits_s == pytest.approx(10.0, rel=0.2)
        while steady.scheduler.has_work:
            steady.step(0.5)
        steady.step(0.5)


def test_what_another_core_had_accepted_is_not_refused() -> None:
    """After a restart, sequences that had held rows were refused: they all came back at once."""
    shares = Tenants(default=TenantShare(max_waiting=0))
    harness = Harness(max_num_seqs=1, max_queue_size=1, max_queue_tokens=1, tenants=shares)
    for _ in range(4):
        harness.submit([1, 2], max_tokens=3, is_taken_over=True)
    with pytest.raises(QueueFull):
        harness.submit([1, 2], max_tokens=3)
    harness.run()
    harness.verify()


# ---- admission to the cache


def test_reserved_sequences_are_never_preempted_and_optimistic_ones_are() -> None:
    """Full-length reservation: slower to start, but what runs runs through."""
    preemptions = {}
    for mode in ("optimistic", "reserve"):
        harness = Harness(block_size=2, num_blocks=20, max_num_seqs=4, max_num_tokens=16, kv_admission=mode)
        for index in range(10):
            harness.submit([index] * 4, max_tokens=16, n=1 + index % 2, temperature=1.0)
        harness.run()
        harness.verify()
        preemptions[mode] = harness.scheduler.stats().preemptions
    assert preemptions["reserve"] == 0 < preemptions["optimistic"]


def test_reservation_counts_shared_blocks_once() -> None:
    """Eight requests with one long common prompt were run two at a time."""
    harness = Harness(block_size=2, num_blocks=24, max_num_seqs=8, max_num_tokens=64, kv_admission="reserve")
    common = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 1, 2, 3, 4]
    harness.submit(common, max_tokens=1)
    harness.run()
    for index in range(6):
        harness.submit([*common, index], max_tokens=4)
    harness.step()
    assert harness.scheduler.stats().num_running == 6
    harness.run()
    harness.verify()


def test_the_watermark_stays_free_while_something_runs() -> None:
    harness = Harness(block_size=2, num_blocks=20, max_num_seqs=8, max_num_tokens=64, kv_watermark=0.5)
    for index in range(6):
        harness.submit([index] * 6, max_tokens=2)
    harness.step()
    assert harness.scheduler.stats().num_free_blocks == 20 - 3 * 3
    alone = harness.submit([7] * 36, max_tokens=4)
    harness.run()
    assert harness.finished[alone].reason == "length", "more than the watermark leaves, but nothing else ran"


# ---- the file


def test_a_tenants_file_is_read_with_its_defaults() -> None:
    tenants = parse_tenants(
        '{"default": {"max_waiting": 7}, "tenants": {"a": {"weight": 2}, "b": {"max_waiting": null}}}'
    )
    assert tenants.share_of("a") == TenantShare(weight=2, max_waiting=7)
    assert tenants.share_of("b") == TenantShare()
    assert tenants.share_of("who") == TenantShare(max_waiting=7)
    assert parse_tenants("{}") == Tenants()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("[]", "the file: must be a JSON object"),
        ('{"tenant": {}}', "the file: 'tenant' is not known; use default, tenants"),
        ('{"tenants": {"a": 3}}', "tenants.a: must be a JSON object"),
        ('{"tenants": {"a": {"wieght": 1}}}', "tenants.a: 'wieght' is not known; use weight,"),
        ('{"tenants": {"a": {"weight": "1"}}}', "tenants.a.weight='1': must be a number"),
        ('{"tenants": {"a": {"weight": true}}}', "tenants.a.weight=True: must be a number"),
        ('{"tenants": {"a": {"weight": 0}}}', "tenants.a.weight=0: must be 0.001 to 1000"),
        ('{"tenants": {"a": {"weight": NaN}}}', "tenants.a.weight=nan"),
        ('{"default": {"max_running": 0}}', "default.max_running=0: must be 1 to 2147483647"),
        (
            '{"default": {"max_waiting": 100000000000000000000}}',
            "default.max_waiting=100000000000000000000: must be 0 to",
        ),
        ('{"tenants": {"\\ud800": {}}}', "'\\ud800' has characters that cannot be printed"),
        ("[" * 100_000, "not JSON"),
        ('{"default": {"max_running": 1.5}}', "default.max_running=1.5: must be a whole number or null"),
        ('{"default": {"kv_share": 1.5}}', "default.kv_share=1.5: must be above 0 and at most 1"),
        ('{"default": {"max_waiting": -1}}', "default.max_waiting=-1"),
        ('{"tenants": {"a": {}, "a": {}}}', "'a' appears twice"),
    ],
)
def test_a_tenants_file_with_a_mistake_is_refused_with_its_place(text: str, words: str) -> None:
    """A mistyped quota was ignored in silence, and the tenant had none."""
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse_tenants(text)
