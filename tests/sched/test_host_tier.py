"""The second level of the cache: what was evicted is found again, and preempted sequences leave their blocks there."""

from __future__ import annotations

import pytest
from sched_harness import VOCAB_SIZE, Harness

from pageflight.core.stats import CoreStats


def prompt(length: int, first: int = 0) -> list[int]:
    return [(first + position * position) % VOCAB_SIZE for position in range(length)]


def crowded(
    *, num_host_blocks: int = 24, host_copy_s: float = 0.0, prefix_cache: bool = True, ahead: int = 0
) -> Harness:
    """Two sequences of 40 tokens do not fit 15 blocks of 4."""
    return Harness(
        block_size=4,
        num_blocks=15,
        max_num_tokens=16,
        max_num_seqs=2,
        max_model_len=56,
        num_host_blocks=num_host_blocks,
        host_copy_s=host_copy_s,
        prefix_cache=prefix_cache,
        step_s=0.01,
        ahead=ahead,
    )


def run_two(harness: Harness) -> CoreStats:
    harness.submit(prompt(18), max_tokens=22)
    harness.submit(prompt(18, 3), max_tokens=22)
    harness.run()
    harness.verify()
    return harness.scheduler.stats()


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_swapped_sequence_resumes_with_exactly_its_blocks(prefix_cache: bool, ahead: int) -> None:
    """A preempted sequence computed everything again although its blocks could have waited in host memory."""
    harness = crowded(prefix_cache=prefix_cache, ahead=ahead)
    stats = run_two(harness)
    assert stats.preemptions == stats.swaps_out == stats.swaps_in == 1
    assert stats.recomputed_tokens == 0 and stats.blocks_copied_in > 0
    _first, resumed = [plan for plan in harness.plans if any(start.handle == 1 for start in plan.starts)]
    (chunk,) = [chunk for chunk in resumed.chunks if chunk.row == resumed.starts[0].row]
    assert chunk.length == 1 and chunk.samples, "nothing but its last token is left to compute"


def test_preemption_computes_again_where_copying_would_take_longer() -> None:
    stats = run_two(crowded(host_copy_s=10.0))
    assert stats.preemptions == 1 and stats.swaps_out == 0 and stats.blocks_copied_in == 0


def test_preemption_computes_again_where_the_host_has_no_room() -> None:
    """A swap that found no slot in the middle kept half of the blocks."""
    stats = run_two(crowded(num_host_blocks=3, prefix_cache=False))
    assert stats.preemptions == 1 and stats.swaps_out == 0 and stats.blocks_copied_out == 0
    assert stats.recomputed_tokens > 0


@pytest.mark.parametrize("end", ["cancel", "deadline"])
def test_a_swapped_sequence_that_ends_gives_its_slots_back(end: str) -> None:
    harness = crowded()
    harness.submit(prompt(18), max_tokens=22)
    swapped = harness.submit(prompt(18, 3), max_tokens=22, deadline_s=2.0)
    while not harness.scheduler.stats().swaps_out:
        harness.step()
    stats = harness.scheduler.stats()
    assert stats.num_free_host_blocks < stats.num_host_blocks
    if end == "cancel":
        harness.cancel(swapped)
    else:
        harness.clock.advance(2.0)
        harness.step()
    stats = harness.scheduler.stats()
    assert stats.num_free_host_blocks == stats.num_host_blocks and stats.num_preempted == 0
    harness.run()
    harness.verify()


def test_blocks_that_others_still_hold_are_not_copied_in_again() -> None:
    """Resuming behind a shared prompt brought a second copy of it onto the device."""
    harness = crowded()
    common = prompt(20)
    harness.submit([*common, 1], max_tokens=25)
    harness.submit([*common, 2], max_tokens=25)
    harness.run()
    harness.verify()
    stats = harness.scheduler.stats()
    assert stats.swaps_in == 1
    held = blocks_of(harness, 1)
    fetched = sum(0 if plan.copy_in_blocks is None else plan.copy_in_blocks.size for plan in harness.plans)
    assert fetched <= held - len(common) // 4


def blocks_of(harness: Harness, handle: int) -> int:
    return harness.finished[handle].num_reused_blocks + harness.finished[handle].num_new_blocks


def reread(*, host_copy_s: float = 0.0, num_host_blocks: int = 64) -> Harness:
    """A long prompt, others that push it out of the first level, and the long prompt again."""
    harness = Harness(
        block_size=4,
        num_blocks=16,
        max_model_len=56,
        num_host_blocks=num_host_blocks,
        host_copy_s=host_copy_s,
        step_s=0.01,
    )
    for first in (0, 3, 5, 6, 7):
        harness.submit(prompt(41, first), max_tokens=2)
        harness.run()
    harness.submit(prompt(41), max_tokens=2)
    harness.run()
    harness.verify()
    return harness


def test_what_the_device_had_no_room_for_is_found_on_the_host() -> None:
    stats = reread().scheduler.stats()
    assert stats.cached_tokens == stats.host_cached_tokens == 40
    assert stats.blocks_copied_in == 10 and stats.saved_s > 0
    assert stats.queried_tokens == 6 * 41
    assert reread(num_host_blocks=0).scheduler.stats().cached_tokens == 0


def test_what_is_quicker_to_compute_is_not_copied_in() -> None:
    stats = reread(host_copy_s=10.0).scheduler.stats()
    assert stats.cached_tokens == 0 and stats.blocks_copied_in == 0


def test_blocks_of_high_priority_outlast_those_that_came_later() -> None:
    """A system prompt used once an hour was gone after a minute of other prompts."""
    harness = Harness(block_size=4, num_blocks=32, max_model_len=56)
    harness.submit(prompt(41), max_tokens=1, kv_retention_priority=100)
    harness.run()
    for first in range(12):
        harness.submit(prompt(41, first + 1), max_tokens=1, tenant=str(first))
        harness.run()
    again = harness.submit(prompt(41), max_tokens=1)
    harness.run()
    assert harness.finished[again].num_cached_tokens == 40
    for first in range(12):
        harness.submit(prompt(41, first + 1), max_tokens=1, tenant=str(first), kv_retention_priority=100)
        harness.run()
    late = harness.submit(prompt(41), max_tokens=1)
    harness.run()
    assert harness.finished[late].num_cached_tokens == 0, "among equals the one used last stays"


def test_a_request_can_say_that_what_it_found_is_worth_less_now() -> None:
    harness = Harness(block_size=4, num_blocks=32, max_model_len=56)
    for priority in (100, None, 0):
        harness.submit(prompt(41), max_tokens=1, kv_retention_priority=priority)
        harness.run()
    cached = [harness.finished[handle].num_cached_tokens for handle in range(3)]
    assert cached == [0, 40, 40]
    for first in range(4):
        harness.submit(prompt(41, first + 1), max_tokens=1, tenant=str(first))
        harness.run()
    late = harness.submit(prompt(41), max_tokens=1)
    harness.run()
    assert harness.finished[late].num_cached_tokens == 0
