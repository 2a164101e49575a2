from __future__ import annotations

import numpy as np
import pytest
from sched_harness import VOCAB_SIZE, Harness

from pageflight.core.config import KVConfig, SchedulerConfig
from pageflight.core.errors import ConfigError, QueueFull
from pageflight.core.plan import StepResult
from pageflight.core.request import Request, SamplingParams
from pageflight.runners.fake import fake_log_prob
from pageflight.sched.scheduler import Scheduler


def prompt(length: int, first: int = 0) -> list[int]:
    return [(first + position) % VOCAB_SIZE for position in range(length)]


def test_a_request_alone_gets_the_tokens_of_the_reference() -> None:
    """The harness's expectation and the whole path agree on the simplest case."""
    harness = Harness()
    handle = harness.submit(prompt(5), max_tokens=7)
    harness.run()
    harness.verify()
    assert len(harness.output_ids[handle]) == 7 and harness.finished[handle].reason == "length"


def test_a_long_prompt_runs_in_chunks_beside_decoding_rows() -> None:
    """A whole prompt in one step made every running stream stand still meanwhile."""
    harness = Harness(max_num_tokens=8, max_num_seqs=4)
    harness.submit(prompt(3), max_tokens=12)
    harness.step()
    long = harness.submit(prompt(30), max_tokens=2)
    for start in (0, 7, 14, 21):
        plan = harness.step()
        assert plan is not None
        decode, chunk = plan.chunks
        assert decode.length == 1 and decode.samples
        assert (chunk.start, chunk.length, chunk.samples) == (start, 7, False)
    harness.run()
    harness.verify()
    assert harness.finished[long].reason == "length"


def test_a_decode_step_has_one_token_for_every_running_sequence() -> None:
    """Prompts that wait must not take the budget of rows that decode."""
    harness = Harness(max_num_tokens=4, max_num_seqs=4, num_blocks=64)
    for first in range(6):
        harness.submit(prompt(4, first), max_tokens=20)
    seen_full = False
    for _ in range(30):
        plan = harness.step()
        assert plan is not None
        decoding = int(plan.samples.sum())
        seen_full = seen_full or decoding == 4
    assert seen_full
    harness.run()
    harness.verify()


def test_plans_carry_differences_only() -> None:
    """Sending whole block tables every step made the cost of a step grow with the context."""
    harness = Harness(block_size=4)
    harness.submit(prompt(5), max_tokens=8)
    first, second = harness.step(), harness.step()
    assert first is not None and second is not None
    assert len(first.starts) == 1 and first.table_blocks is not None and len(first.table_blocks) == 2
    assert second.starts == () and second.table_rows is None and second.ended_rows == ()
    harness.run()
    with_update = [plan.step for plan in harness.plans if plan.table_rows is not None]
    assert with_update == [0, 4], "a block is told only when a sequence crosses into it"


def test_an_ended_row_is_told_and_reused() -> None:
    """A runner that was never told kept sampling state of a sequence that had gone."""
    harness = Harness(max_num_seqs=1)
    harness.submit(prompt(2), max_tokens=1)
    harness.submit(prompt(3), max_tokens=1)
    harness.run()
    first, second = harness.plans
    assert second.ended_rows == (first.starts[0].row,) and second.starts[0].row == first.starts[0].row


def test_equal_prompts_share_all_full_blocks_but_compute_the_last_token() -> None:
    """A prompt found whole in the cache left nothing to compute, so no logits to sample from."""
    harness = Harness(block_size=4)
    harness.submit(prompt(8), max_tokens=2)
    harness.run()
    second = harness.submit(prompt(8), max_tokens=2)
    plan = harness.step()
    assert plan is not None and [(c.start, c.length) for c in plan.chunks] == [(4, 4)]
    harness.run()
    harness.verify()
    ending = harness.finished[second]
    assert (ending.num_cached_tokens, ending.num_reused_blocks, ending.num_new_blocks) == (4, 1, 2)
    assert harness.scheduler.stats().cached_tokens == 4


def test_output_blocks_are_found_by_the_next_turn_of_a_conversation() -> None:
    """Only prompts were registered; every turn of a chat computed the previous answer again."""
    harness = Harness(block_size=4)
    first = harness.submit(prompt(6), max_tokens=7)
    harness.run()
    history = prompt(6) + harness.output_ids[first] + prompt(3)
    second = harness.submit(history, max_tokens=2)
    harness.run()
    assert harness.finished[second].num_cached_tokens == 12


@pytest.mark.parametrize(("option", "value"), [("cache_salt", "other"), ("tenant", "other")])
def test_salt_and_tenant_keep_prompts_apart(option: str, value: str) -> None:
    """Time to first token told one client what another had asked."""
    harness = Harness(block_size=4)
    harness.submit(prompt(12), max_tokens=1)
    harness.run()
    keywords = {option: value}
    other = harness.submit(prompt(12), max_tokens=1, **keywords)  # type: ignore[arg-type]
    harness.run()
    assert harness.finished[other].num_cached_tokens == 0


def test_without_prefix_cache_nothing_is_shared() -> None:
    harness = Harness(block_size=4, prefix_cache=False)
    handles = [harness.submit(prompt(12), max_tokens=2) for _ in range(2)]
    harness.run()
    harness.verify()
    assert all(harness.finished[handle].num_cached_tokens == 0 for handle in handles)


def test_unused_cached_blocks_count_as_free_and_are_evicted() -> None:
    """A full prefix cache refused new sequences although nobody held its blocks."""
    harness = Harness(block_size=4, num_blocks=8)
    for first in range(5):
        harness.submit(prompt(24, first), max_tokens=4)
        harness.run()
    harness.verify()
    assert harness.scheduler.stats().num_free_blocks == 8


def test_the_youngest_is_preempted_and_resumes_first_with_its_output() -> None:
    """The victim went to the end of the queue: it was overtaken by everyone and its stream stood still."""
    harness = Harness(block_size=1, num_blocks=14, max_num_seqs=2, prefix_cache=False)
    old = harness.submit(prompt(4), max_tokens=8)
    young = harness.submit(prompt(4, 1), max_tokens=8)
    late = harness.submit(prompt(2, 2), max_tokens=2)
    while not harness.scheduler.stats().num_preempted:
        harness.step()
    assert harness.output_ids[young] and not harness.output_ids[late]
    harness.run()
    harness.verify()
    restart = [start for plan in harness.plans for start in plan.starts if start.handle == young][1]
    assert len(restart.token_ids) > restart.num_prompt, "its output came with it"
    order = [start.handle for plan in harness.plans for start in plan.starts]
    assert order == [old, young, young, late]
    stats = harness.scheduler.stats()
    assert stats.preemptions == 1 and stats.recomputed_tokens > 0 and stats.num_preempted == 0


def test_a_resumed_sequence_finds_its_blocks_when_nobody_took_them() -> None:
    """Preemption by recompute computed everything again even where the blocks still held it."""
    harness = Harness(block_size=2, num_blocks=9, max_num_seqs=2)
    harness.submit(prompt(6), max_tokens=6)
    harness.submit(prompt(6, 1), max_tokens=6)
    harness.run()
    harness.verify()
    stats = harness.scheduler.stats()
    assert stats.preemptions >= 1
    assert stats.recomputed_tokens < 6 * stats.preemptions


def test_the_lowest_priority_is_preempted_before_the_youngest() -> None:
    harness = Harness(block_size=1, num_blocks=14, max_num_seqs=2, prefix_cache=False)
    low = harness.submit(prompt(4), max_tokens=8, priority=-1)
    high = harness.submit(prompt(4, 1), max_tokens=8)
    harness.run()
    harness.verify()
    starts = [start.handle for plan in harness.plans for start in plan.starts]
    assert starts.count(low) == 2 and starts.count(high) == 1


def test_higher_priority_is_admitted_first_and_arrival_decides_within() -> None:
    harness = Harness(max_num_seqs=1)
    handles = [harness.submit(prompt(2), max_tokens=1, priority=priority) for priority in (0, 2, 0, 2, 1)]
    harness.run()
    order = [start.handle for plan in harness.plans for start in plan.starts]
    assert order == [handles[index] for index in (1, 3, 4, 0, 2)]


def test_more_demand_than_cache_still_ends_every_sequence() -> None:
    """Two sequences that preempted each other in turn never ended."""
    harness = Harness(block_size=2, num_blocks=12, max_num_seqs=4, max_num_tokens=8)
    for first in range(12):
        harness.submit(prompt(10, first), max_tokens=12)
    harness.run(max_steps=2000)
    harness.verify()


def test_admission_leaves_room_for_running_sequences_to_grow() -> None:
    """Filling the cache to the last block with new prompts got them preempted one step later."""
    harness = Harness(block_size=4, num_blocks=8, max_num_seqs=8, max_num_tokens=64)
    for first in range(8):
        harness.submit(prompt(4, first), max_tokens=4)
    harness.run()
    assert harness.scheduler.stats().preemptions == 0


@pytest.mark.parametrize("length", [1, 4, 5, 9])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_followers_share_the_prompt_and_copy_its_last_block(length: int, prefix_cache: bool) -> None:
    """The partial block was shared: three sequences wrote their own tokens into the same positions."""
    harness = Harness(block_size=4, prefix_cache=prefix_cache)
    first = harness.submit(prompt(length), n=3, temperature=1.0, seed=3, max_tokens=6)
    harness.run()
    harness.verify()
    outputs = [harness.output_ids[first + index] for index in range(3)]
    assert outputs[0] != outputs[1] != outputs[2], "each follows its own sequence index"
    computed = sum(plan.num_tokens for plan in harness.plans)
    assert computed == length + 3 * 5 + 2, "the prompt once, then one token at a time"
    num_copies = sum(0 if plan.copy_sources is None else len(plan.copy_sources) for plan in harness.plans)
    assert num_copies == (2 if (length - 1) % 4 else 0)


def test_followers_are_forked_even_if_the_leader_ends_with_its_first_token() -> None:
    """The leader's blocks were given away before the followers' copy had been made."""
    harness = Harness(block_size=4, num_blocks=6, prefix_cache=False)
    first = harness.submit(prompt(6), n=2, temperature=1.0, max_tokens=1)
    other = harness.submit(prompt(8, 3), max_tokens=3)
    harness.run()
    harness.verify()
    assert harness.finished[first + 1].num_reused_blocks == 1 and other in harness.finished


def test_a_follower_without_room_waits_as_an_ordinary_sequence() -> None:
    harness = Harness(block_size=4, max_num_seqs=2)
    first = harness.submit(prompt(9), n=4, temperature=1.0, max_tokens=5)
    harness.run()
    harness.verify()
    assert {first, first + 1, first + 2, first + 3} == set(harness.finished)


def test_a_follower_leads_on_when_its_leader_is_cancelled_before_the_prompt_is_computed() -> None:
    """Its followers waited for ever for a prompt that nobody computed any more."""
    harness = Harness(max_num_tokens=4, max_num_seqs=4)
    first = harness.submit(prompt(12), n=3, temperature=1.0, max_tokens=3)
    harness.step()
    assert harness.cancel(first)
    harness.run()
    harness.verify()
    assert [harness.finished[first + index].reason for index in range(3)] == ["cancelled", "length", "length"]


def test_cancel_returns_every_block_in_every_state() -> None:
    """A chunked prompt kept its first blocks after cancel."""
    harness = Harness(block_size=4, max_num_tokens=8, max_num_seqs=2, prefix_cache=False)
    decoding = harness.submit(prompt(3), max_tokens=20)
    harness.step()
    prefilling = harness.submit(prompt(20), n=2, max_tokens=5)
    harness.step()
    waiting = harness.submit(prompt(4), max_tokens=5)
    assert (harness.scheduler.stats().num_context, harness.scheduler.stats().num_waiting) == (1, 2)
    for handle in (waiting, prefilling + 1, prefilling, decoding):
        assert harness.cancel(handle) and not harness.cancel(handle)
    assert harness.scheduler.stats().num_free_blocks == harness.kv.num_blocks
    assert not harness.scheduler.has_work
    harness.run()
    assert {ending.reason for ending in harness.finished.values()} == {"cancelled"}
    assert harness.scheduler.stats().cancellations == 4


def test_a_stop_string_is_no_cancellation() -> None:
    """Answers that ended at a stop word were counted as cancelled by their clients."""
    scheduler = Scheduler(SchedulerConfig(max_model_len=64), KVConfig(num_blocks=8, block_size=4), vocab_size=97)
    for handle in range(2):
        scheduler.submit(Request(handle=handle, prompt_ids=(1, 2), sampling=SamplingParams()), 0.0)
    assert scheduler.cancel(0, by_client=False)
    assert scheduler.cancel(1)
    assert scheduler.stats().cancellations == 1


def test_every_sequence_of_a_request_counts_in_the_queue() -> None:
    """Sixty-four answers to one prompt passed a queue limit as one."""
    config = SchedulerConfig(max_num_seqs=2, max_model_len=64, max_queue_size=4)
    scheduler = Scheduler(config, KVConfig(num_blocks=64, block_size=4), vocab_size=97)
    scheduler.submit(Request(handle=0, prompt_ids=(1, 2), sampling=SamplingParams(n=4)), 0.0)
    with pytest.raises(QueueFull):
        scheduler.submit(Request(handle=10, prompt_ids=(1, 2), sampling=SamplingParams(n=3)), 0.0)
    scheduler.submit(Request(handle=10, prompt_ids=(1, 2), sampling=SamplingParams(n=2)), 0.0)


def test_cancel_between_plan_and_settle_drops_the_token() -> None:
    """A token of a cancelled sequence went to the sequence that had taken its row."""
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=1), KVConfig(num_blocks=4), vocab_size=VOCAB_SIZE)
    for handle in (1, 2):
        scheduler.submit(Request(handle=handle, prompt_ids=(1, 2), sampling=SamplingParams(max_tokens=4)), 0.0)
    plan = scheduler.plan(0.0)
    assert plan is not None
    scheduler.cancel(1)
    ahead = scheduler.plan(0.0)
    assert ahead is not None and ahead.ended_rows == (0,) and ahead.starts[0].handle == 2
    events = scheduler.settle(plan, StepResult(plan.step, np.array([7], np.int32)), 0.0)
    assert len(events.ids) == 0 and [ending.handle for ending in events.finished] == [1]
    events = scheduler.settle(ahead, StepResult(ahead.step, np.array([8], np.int32)), 0.0)
    assert events.handles.tolist() == [2] and events.ids.tolist() == [8]
    scheduler.check()


def test_blocks_filled_by_a_cancelled_sequence_are_not_registered() -> None:
    """A block that was computed for a cancelled sequence was free already when it entered the prefix cache."""
    harness = Harness(block_size=4, max_num_seqs=1, ahead=1)
    first = harness.submit(prompt(8), max_tokens=4)
    harness.step()
    harness.cancel(first)
    assert harness.step() is None
    again = harness.submit(prompt(8), max_tokens=4)
    harness.run()
    harness.verify()
    assert harness.finished[again].num_cached_tokens == 0


def test_followers_wait_for_a_leader_that_was_preempted_and_came_back_while_its_prompt_was_under_way() -> None:
    """They forked from the new blocks, which the first computation of the prompt had never written."""
    harness = Harness(block_size=1, num_blocks=10, max_num_seqs=3, max_num_tokens=4, prefix_cache=False, ahead=2)
    old = harness.submit([1, 2], max_tokens=6)
    harness.step()
    harness.submit([3] * 6, n=2, temperature=1.0, max_tokens=3)
    for _ in range(3):
        harness.step()
    assert harness.scheduler.stats().preemptions == 1
    harness.cancel(old)
    harness.run()
    harness.verify()


def test_a_fork_that_ends_before_it_runs_leaves_no_trace() -> None:
    """The runner was told to copy into a block that had gone to another sequence."""
    harness = Harness(block_size=4, max_num_seqs=3, num_blocks=12)
    first = harness.submit(prompt(6), n=3, temperature=1.0, max_tokens=4)
    harness.step()
    assert harness.scheduler.stats().num_running == 3
    harness.cancel(first + 1)
    other = harness.submit(prompt(3, 7), max_tokens=3)
    plan = harness.step()
    assert plan is not None and plan.ended_rows == () and plan.copy_sources is not None and len(plan.copy_sources) == 1
    assert {start.handle for start in plan.starts} == {first + 2, other}
    harness.run()
    harness.verify()


def test_deadlines_end_running_and_waiting_sequences() -> None:
    """Only waiting requests were looked at; a stream went on long after its client had given up."""
    harness = Harness(max_num_seqs=1)
    running = harness.submit(prompt(2), max_tokens=30, deadline_s=5.0)
    waiting = harness.submit(prompt(2), max_tokens=3, deadline_s=2.0)
    patient = harness.submit(prompt(2), max_tokens=3, deadline_s=100.0)
    assert harness.scheduler.next_deadline_s == 2.0
    harness.step()
    harness.clock.advance(2.0)
    harness.step()
    assert harness.finished[waiting].reason == "deadline" and running not in harness.finished
    harness.clock.advance(3.0)
    harness.step()
    assert harness.finished[running].reason == "deadline" and len(harness.output_ids[running]) == 2
    harness.run()
    harness.verify()
    assert harness.finished[patient].reason == "length" and harness.scheduler.next_deadline_s is None


def test_ended_sequences_leave_the_deadline_heap() -> None:
    """Every request with a long timeout stayed in memory until it would have run out."""
    harness = Harness()
    for _ in range(700):
        handle = harness.submit(prompt(2), max_tokens=1, deadline_s=1e9)
        harness.cancel(handle)
        harness.scheduler.take_endings()
    assert len(harness.scheduler._deadlines._heap) < 300


@pytest.mark.parametrize("num_other_ids", [0, 6])
def test_a_stop_id_ends_the_sequence_and_counts_as_output(num_other_ids: int) -> None:
    """More stop ids than the row arrays hold were cut off."""
    harness = Harness()
    probe = harness.submit(prompt(4), max_tokens=12)
    harness.run()
    ids = harness.output_ids[probe]
    never = tuple(i for i in range(VOCAB_SIZE) if i not in ids)[:num_other_ids]
    stop = ids[5]
    handle = harness.submit(prompt(4), max_tokens=12, stop_token_ids=(*never, stop))
    harness.run()
    harness.verify()
    assert harness.finished[handle].reason == "stop"
    assert harness.output_ids[handle] == ids[: ids.index(stop) + 1]


def test_a_stop_id_before_min_tokens_does_not_end_the_sequence() -> None:
    harness = Harness()
    probe = harness.submit(prompt(4), max_tokens=8)
    harness.run()
    ids = harness.output_ids[probe]
    handle = harness.submit(prompt(4), max_tokens=8, min_tokens=8, stop_token_ids=tuple(set(ids)))
    harness.run()
    assert harness.output_ids[handle] == ids and harness.finished[handle].reason == "length"


def test_a_sequence_taken_over_continues_where_it_was() -> None:
    """After a restart the answer began again, or its random numbers did."""
    harness = Harness()
    probe = harness.submit(prompt(5), n=2, temperature=1.0, seed=9, max_tokens=10)
    harness.run()
    ids = harness.output_ids[probe + 1]
    again = Harness()
    handle = again.submit(
        prompt(5), temperature=1.0, seed=9, max_tokens=10, sequence_index=1, output_ids=tuple(ids[:4])
    )
    again.run()
    assert again.output_ids[handle] == ids[4:] and again.finished[handle].num_output_tokens == 10
    assert again.scheduler.stats().recomputed_tokens == 8


@pytest.mark.parametrize(("stop_token_ids", "reason"), [((), "length"), ((2,), "stop")])
def test_a_sequence_taken_over_at_its_end_gets_only_its_final_event(
    stop_token_ids: tuple[int, ...], reason: str
) -> None:
    """The core died between the last token and the final event; the sequence went on beyond max_tokens."""
    harness = Harness()
    handle = harness.submit(prompt(5), max_tokens=3, output_ids=(1, 1, 2), stop_token_ids=stop_token_ids)
    harness.run()
    assert harness.output_ids[handle] == [] and harness.finished[handle].reason == reason


def test_log_probs_travel_with_their_tokens() -> None:
    harness = Harness()
    plain = harness.submit(prompt(3), max_tokens=4)
    wanted = harness.submit(prompt(3, 1), max_tokens=4, log_probs=True)
    harness.run()
    assert harness.log_probs[wanted] == [fake_log_prob(token) for token in harness.output_ids[wanted]]
    assert len(harness.log_probs[plain]) == 4


def test_fail_ends_one_sequence_with_the_reason() -> None:
    harness = Harness()
    bad, good = (harness.submit(prompt(3), max_tokens=4) for _ in range(2))
    harness.step()
    assert harness.scheduler.fail(bad, "it broke the core three times")
    assert not harness.scheduler.fail(bad, "again")
    harness.run()
    harness.verify()
    assert harness.finished[bad].reason == "error" and "three times" in harness.finished[bad].message
    assert harness.finished[good].reason == "length"


def test_ten_thousand_waiting_do_not_enter_a_step() -> None:
    """Sorting or scanning the queue made each step as long as the queue."""
    harness = Harness(max_num_seqs=2, max_queue_size=20_000)
    running = harness.submit(prompt(3), max_tokens=40, priority=5)
    for _ in range(1_000):
        harness.scheduler.submit(
            Request(handle=harness._next_handle, prompt_ids=(1, 2), sampling=SamplingParams(max_tokens=30)), 0.0
        )
        harness._next_handle += 1
    looked_at = []
    queue = harness.scheduler._batch.waiting
    original = queue.peek
    queue.peek = lambda: looked_at.append(1) or original()  # type: ignore[method-assign, func-returns-value]
    for _ in range(10):
        plan = harness.scheduler.plan(0.0)
        assert plan is not None
        harness.runner.submit(plan)
        harness.scheduler.settle(plan, harness.runner.collect(), 0.0)
    assert len(looked_at) <= 20 and running == 0


def test_decode_steps_share_their_unchanged_arrays_read_only() -> None:
    """A runner that wrote into a plan's array changed every later plan."""
    harness = Harness()
    harness.submit(prompt(3), max_tokens=6)
    harness.step()
    one, two = harness.step(), harness.step()
    assert one is not None and two is not None
    assert one.rows is two.rows and not one.rows.flags.writeable and not one.lengths.flags.writeable
    assert one.starts_at is not two.starts_at


def test_a_step_budget_below_the_number_of_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_tokens=4: must be at least max_num_seqs=8"):
        Scheduler(SchedulerConfig(max_num_tokens=4, max_num_seqs=8), KVConfig(num_blocks=4), vocab_size=5)
    with pytest.raises(ConfigError, match="num_blocks=0"):
        Scheduler(SchedulerConfig(), KVConfig(), vocab_size=5)
