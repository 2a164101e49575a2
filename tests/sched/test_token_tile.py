"""Steps that would only just begin another tile of the engine leave those tokens for the next step."""

from __future__ import annotations

from pageflight.core.config import KVConfig, SchedulerConfig
from pageflight.core.request import Request, SamplingParams
from pageflight.runners.base import RunnerLimits
from pageflight.runners.fake import FakeRunner, fake_continuation
from pageflight.sched.draft import Chunks
from pageflight.sched.scheduler import Scheduler
from pageflight.sched.sequence import Sequence

VOCAB = 97


def run(prompt_lengths: list[int], tile: int) -> tuple[list[list[int]], dict[int, list[int]], int]:
    """Lengths of every plan's chunks, ids by handle, and steps, with everything submitted at the start."""
    config = SchedulerConfig(max_num_tokens=64, max_num_seqs=8, max_model_len=128, token_tile=tile)
    kv = KVConfig(num_blocks=64, block_size=4)
    scheduler = Scheduler(config, kv, vocab_size=VOCAB)
    runner = FakeRunner(RunnerLimits(num_blocks=64, block_size=4, max_num_seqs=8, max_model_len=128, vocab_size=VOCAB))
    for handle, length in enumerate(prompt_lengths):
        prompt = tuple((handle * 31 + position) % VOCAB for position in range(length))
        scheduler.submit(Request(handle=handle, prompt_ids=prompt, sampling=SamplingParams(max_tokens=6)), 0.0)
    lengths: list[list[int]] = []
    ids: dict[int, list[int]] = {handle: [] for handle in range(len(prompt_lengths))}
    while scheduler.has_work:
        plan = scheduler.plan(float(len(lengths)))
        assert plan is not None, "open sequences, and nothing to run"
        runner.submit(plan)
        events = scheduler.settle(plan, runner.collect(), 0.0)
        scheduler.check()
        lengths.append(plan.lengths.tolist())
        for handle, token in zip(events.handles.tolist(), events.ids.tolist(), strict=True):
            ids[handle].append(token)
        assert len(lengths) < 100, "no progress"
    return lengths, ids, len(lengths)


def test_a_prompt_that_only_just_passes_a_tile_leaves_the_rest_for_the_next_step() -> None:
    """A step of 18 tokens was paid for as 32."""
    lengths, _, _ = run([18], tile=16)
    assert lengths[:2] == [[16], [2]]


def test_a_prompt_that_fills_most_of_the_next_tile_runs_whole() -> None:
    lengths, _, _ = run([29], tile=16)
    assert lengths[0] == [29]


def test_a_chunk_within_the_excess_waits_whole_and_the_one_before_it_is_trimmed() -> None:
    """15 + 2 + 2 = 19 tokens: three too many; the last prompt waits, the one before loses one token."""
    lengths, _, _ = run([15, 2, 2], tile=16)
    assert lengths[0] == [15, 1]
    assert sum(lengths[1]) == 1 + 1 + 2


def test_trimming_changes_no_token() -> None:
    prompts = [18, 5, 33, 2, 50, 17, 16, 1, 47]
    _, plain, _ = run(prompts, tile=1)
    _, trimmed, _ = run(prompts, tile=16)
    assert trimmed == plain
    prompt = tuple(position % VOCAB for position in range(18))
    assert plain[0] == list(fake_continuation(prompt, SamplingParams(max_tokens=6), vocab_size=VOCAB))[:6]


def test_the_only_chunk_always_runs() -> None:
    """Seven tokens beside 64 that decode cost a tile; its client would wait for far longer than that."""
    sequence = Sequence.__new__(Sequence)
    sequence.num_computed = 0
    chunks = Chunks()
    chunks.add(sequence, 7)
    chunks.trim(64, 64)
    assert chunks.lengths == [7]
