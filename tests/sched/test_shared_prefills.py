"""Sequences that share a prefix which is still being computed wait for it instead of computing it again."""

from __future__ import annotations

import numpy as np
import pytest
from sched_harness import VOCAB_SIZE, Harness

from pageflight.core.request import Request, SamplingParams
from pageflight.sched.sequence import Sequence
from pageflight.sched.shared_prefills import SharedPrefills
from pageflight.sched.tenants import Tenant

SIZE = 16
SHARED = tuple(position * 5 % VOCAB_SIZE for position in range(512))
OWN = 7


def prompt(index: int) -> tuple[int, ...]:
    """The shared prefix and a part of this request's own."""
    return (*SHARED, *((index * 3 + position * position) % VOCAB_SIZE for position in range(OWN)))


def crowd(*, prefix_cache: bool = True, ahead: int = 0, max_num_tokens: int = 300) -> Harness:
    """A budget of 300 leaves room beside the leader's second chunk, in which the others would begin."""
    return Harness(
        block_size=SIZE,
        num_blocks=32 * 40,
        max_num_tokens=max_num_tokens,
        max_num_seqs=32,
        max_model_len=600,
        prefix_cache=prefix_cache,
        ahead=ahead,
    )


def num_prompt_tokens_computed(harness: Harness) -> int:
    return sum(chunk.length for plan in harness.plans for chunk in plan.chunks if chunk.start < len(SHARED) + OWN)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("max_num_tokens", [300, 4096, 20_000])
def test_thirty_two_requests_compute_their_shared_prefix_once(max_num_tokens: int, ahead: int) -> None:
    """Admitted in one step, all 32 looked into a cache that knew nothing yet, and computed 512 tokens each."""
    harness = crowd(max_num_tokens=max_num_tokens, ahead=ahead)
    plain = crowd(max_num_tokens=max_num_tokens, ahead=ahead, prefix_cache=False)
    for index in range(32):
        for one in (harness, plain):
            one.submit(prompt(index), max_tokens=4)
    harness.run()
    plain.run()
    harness.verify()
    assert num_prompt_tokens_computed(harness) == 512 + 32 * OWN
    assert num_prompt_tokens_computed(plain) == 32 * (512 + OWN)
    assert harness.output_ids == plain.output_ids


@pytest.mark.parametrize("end", ["cancel", "fail", "deadline"])
def test_when_the_computing_sequence_ends_the_next_one_takes_over(end: str) -> None:
    """The 31 that waited for a cancelled leader waited for ever, or each began from the first token."""
    harness = crowd(ahead=1)
    harness.submit(prompt(0), max_tokens=4, deadline_s=5.0 if end == "deadline" else None)
    for index in range(1, 32):
        harness.submit(prompt(index), max_tokens=4)
    harness.step()
    harness.step()  # the leader's 300 tokens are computed, the rest is under way, the others are parked
    assert num_parked(harness) == 31
    if end == "cancel":
        harness.cancel(0)
    elif end == "fail":
        harness.scheduler.fail(0, "broken")
    else:
        harness.clock.advance(6.0)
    harness.run()
    harness.verify()
    num_kept = 300 // SIZE * SIZE
    assert num_prompt_tokens_computed(harness) == (512 + OWN) + (512 - num_kept) + 31 * OWN
    assert harness.finished[0].reason in ("cancelled", "error", "deadline")


def num_parked(harness: Harness) -> int:
    return harness.scheduler._batch.shared_prefills.num_parked


def test_a_parked_sequence_can_be_cancelled() -> None:
    harness = crowd(ahead=1, max_num_tokens=4096)
    for index in range(4):
        harness.submit(prompt(index), max_tokens=4)
    harness.step()
    assert num_parked(harness) == 3
    harness.cancel(2)
    assert num_parked(harness) == 2
    harness.run()
    harness.verify()
    assert num_prompt_tokens_computed(harness) == 512 + 3 * OWN


def test_those_behind_a_parked_sequence_are_not_held_up() -> None:
    """The queue stood still for everybody while its head waited for a block."""
    harness = crowd(max_num_tokens=4096)
    harness.submit(prompt(0), max_tokens=4)
    harness.submit(prompt(1), max_tokens=4)
    other = harness.submit([1] * 20, max_tokens=4)
    first, second = harness.step(), harness.step()
    assert first is not None and second is not None
    assert [start.handle for start in first.starts] == [0, other]
    assert [start.handle for start in second.starts] == [1]
    harness.run()
    harness.verify()


def test_a_sequence_of_higher_priority_does_not_wait_for_a_lower_one() -> None:
    """What is kept from running by better ones must not keep one of those from running too."""
    prefills, digests = SharedPrefills(), [b"one", b"two", b"three"]
    low, same, high = (sequence(handle, priority, digests) for handle, priority in enumerate((0, 0, 1)))
    prefills.begin(low, 0, 2)
    assert prefills.awaited(same, 0, 3) == b"two", "it waits for the last block that another computes"
    assert prefills.awaited(same, 1, 3) == b"two" and prefills.awaited(same, 2, 3) is None
    assert prefills.awaited(same, 0, 1) == b"one", "a block that it may not share is none to wait for"
    assert prefills.awaited(high, 0, 3) is None


def sequence(handle: int, priority: int, digests: list[bytes]) -> Sequence:
    request = Request(handle=handle, prompt_ids=(1, 2), sampling=SamplingParams(), priority=priority)
    tokens = np.array(request.prompt_ids, np.int32)
    return Sequence(
        request=request,
        handle=handle,
        sequence_index=0,
        tenant=Tenant("", 0),
        rank=(0.0, handle),
        tokens=tokens,
        digests=digests,
    )


def test_a_preempted_leader_does_not_take_its_waiters_with_it() -> None:
    """Its waiters come back to the queue with it, behind it, and none of them is lost."""
    harness = crowd(ahead=1, max_num_tokens=4096)
    for index in range(4):
        harness.submit(prompt(index), max_tokens=4)
    harness.step()
    batch = harness.scheduler._batch
    batch.preempt(batch.rows.held_by(0))
    harness.scheduler.check()
    assert num_parked(harness) == 0
    plan = harness.step()
    assert plan is not None and [start.handle for start in plan.starts] == [0] and num_parked(harness) == 3
    harness.run()
    harness.verify()
    assert num_prompt_tokens_computed(harness) == (512 + OWN) + 512 + 4 * OWN


def test_a_long_queue_with_one_prefix_is_not_walked_through_in_one_step() -> None:
    """Ten thousand requests that share a prefix are looked at a few per step, not all before the first step ends."""
    harness = Harness(block_size=4, num_blocks=64, max_num_tokens=64, max_num_seqs=48, max_queue_size=10_000)
    for handle in range(10_000):
        request = Request(handle=handle, prompt_ids=(*SHARED[:40], 5), sampling=SamplingParams(max_tokens=1))
        harness.scheduler.submit(request, 0.0)
    harness.scheduler.plan(0.0)
    assert 0 < num_parked(harness) <= 48
