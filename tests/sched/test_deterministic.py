"""Deterministic scheduling on a runner that rounds by how a token was computed: every text as if it were alone."""

from __future__ import annotations

import random

import pytest
from sched_harness import Harness

from pageflight.sched.borders import FixedBorders

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]  # ends inside its third block of 4


def chunks_of(harness: Harness, handle: int) -> list[tuple[int, int]]:
    """Start and length of every chunk of the sequence, in whatever row."""
    chunks, holders = [], {}
    for plan in harness.plans:
        holders.update((start.row, start.handle) for start in plan.starts)
        chunks += [(chunk.start, chunk.length) for chunk in plan.chunks if holders[chunk.row] == handle]
    return chunks


@pytest.mark.parametrize(
    ("start", "num_prompt", "num_known", "budget", "length"),
    [
        (0, 10, 10, 3, 0),  # not a whole block
        (0, 10, 10, 7, 4),
        (0, 10, 10, 9, 8),
        (0, 10, 10, 10, 10),  # the prompt's end is a border
        (8, 10, 10, 1, 0),
        (8, 10, 10, 2, 2),
        (0, 9, 9, 20, 8),  # the last token has a block to itself
        (8, 9, 9, 20, 1),
        (0, 1, 1, 20, 1),
        (8, 10, 15, 20, 2),  # output follows in chunks of its own
        (10, 10, 15, 20, 3),
        (13, 10, 15, 20, 2),
        (12, 10, 15, 1, 1),
    ],
)
def test_where_chunks_end(start: int, num_prompt: int, num_known: int, budget: int, length: int) -> None:
    assert FixedBorders(4, 3).length(start, num_prompt, num_known, budget) == length


def test_a_budget_that_is_no_multiple_of_a_block_does_not_move_the_borders() -> None:
    """With 7 tokens a step the second chunk began at 7, and its tiles, in which it is rounded, with it."""
    harness = Harness(deterministic=True, max_num_tokens=7)
    handle = harness.submit(PROMPT, max_tokens=5)
    harness.run()
    harness.verify()
    assert chunks_of(harness, handle)[:2] == [(0, 4), (4, 6)]


def test_prompts_get_on_beside_rows_that_use_the_whole_budget() -> None:
    """Three rows that decode left one token of the budget, never a block: the fourth waited for all of them."""
    harness = Harness(deterministic=True, max_num_tokens=4, max_num_seqs=4)
    first = [harness.submit([number, number], max_tokens=40) for number in (1, 2, 3)]
    late = harness.submit(PROMPT, max_tokens=2)
    harness.run()
    harness.verify()
    order = list(harness.finished)
    assert order.index(late) < min(order.index(handle) for handle in first)


def test_a_preempted_sequence_computes_its_output_token_by_token_again() -> None:
    """Prompt and output went through one chunk when a sequence was computed again."""
    harness = Harness(deterministic=True, num_blocks=8, max_num_seqs=2, prefix_cache=False, replay_rows=3)
    handles = [harness.submit([number] * 6, max_tokens=18) for number in (1, 2)]
    harness.run()
    harness.verify()
    assert harness.scheduler.stats().preemptions > 0, "this cache was meant to be too small"
    again = chunks_of(harness, handles[1])
    assert (6, 3) in again, f"{again}: its output was to be computed again three tokens a step"


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_replayed_sequence_goes_on_as_it_would_have(prefix_cache: bool) -> None:
    harness = Harness(deterministic=True, prefix_cache=prefix_cache, replay_rows=2)
    whole = harness.submit(PROMPT, max_tokens=12, temperature=1.0, seed=5)
    harness.run()
    harness.submit(PROMPT, max_tokens=12, temperature=1.0, seed=5, output_ids=tuple(harness.output_ids[whole][:7]))
    harness.run()
    harness.verify()
    if prefix_cache:
        ending = harness.finished[whole + 1]
        assert ending.num_reused_blocks == 4, "prompt and output are the same: every full block can be shared"


def test_a_prompt_does_not_find_blocks_that_hold_the_same_tokens_as_output() -> None:
    """The next turn of a chat took over blocks computed token by token, which a prompt computes side by side."""
    harness = Harness(deterministic=True)
    first = harness.submit(PROMPT, max_tokens=12)
    harness.run()
    second = harness.submit([*PROMPT, *harness.output_ids[first]], max_tokens=6)
    harness.run()
    harness.verify()
    assert harness.finished[second].num_reused_blocks == 2, "the blocks that hold nothing but the first prompt"


def test_the_same_tokens_after_a_shorter_prompt_are_other_blocks() -> None:
    """A restart that names one output token more as prompt must not meet the blocks of the one before."""
    harness = Harness(deterministic=True)
    first = harness.submit(PROMPT, max_tokens=12)
    harness.run()
    longer = [*PROMPT, harness.output_ids[first][0]]
    harness.submit(longer, max_tokens=11, output_ids=tuple(harness.output_ids[first][1:9]))
    harness.run()
    assert harness.finished[1].num_reused_blocks == 2


@pytest.mark.parametrize("length", [1, 8, 9, 10])
def test_siblings_begin_with_a_chunk_of_their_own(length: int) -> None:
    """They began with a decode row on a copied block; alone, their first token came from the prompt's last chunk."""
    harness = Harness(deterministic=True)
    harness.submit(PROMPT[:length], max_tokens=8, n=3, temperature=1.0, seed=2)
    harness.run()
    harness.verify()
    assert not any(plan.copy_sources is not None for plan in harness.plans)


def test_without_the_setting_chunking_is_heard() -> None:
    """Else the runner of these tests would prove nothing."""
    harness = Harness(deterministic=True, max_num_tokens=7)
    harness.scheduler = Harness(max_num_tokens=7).scheduler
    harness.submit(PROMPT, max_tokens=5)
    harness.run()
    with pytest.raises(AssertionError, match="instead of"):
        harness.verify()


def test_a_prompt_whose_last_chunk_was_under_way_when_it_was_swapped_out_begins_it_again() -> None:
    """All but the last token of the prompt counted as computed, and the next chunk began in the middle of a block."""
    num_swaps = 0
    for seed in range(150):
        chance = random.Random(seed)
        harness = Harness(
            num_blocks=chance.randrange(12, 24),
            max_num_tokens=chance.choice([8, 16, 32]),
            max_num_seqs=chance.randrange(2, 8),
            max_model_len=44,
            num_host_blocks=chance.choice([8, 24, 60]),
            step_s=0.01,
            ahead=1,
            deterministic=True,
            replay_rows=chance.choice([1, 4]),
            kv_admission="optimistic",
            kv_watermark=0.0,
        )
        for _ in range(chance.randrange(3, 10)):
            prompt = [chance.randrange(3) for _ in range(chance.randrange(1, 22))]
            harness.submit(prompt, max_tokens=chance.randrange(1, 20), n=chance.choice([1, 1, 2]))
            for _ in range(chance.randrange(4)):
                harness.step()
        harness.run()
        harness.verify()
        num_swaps += harness.scheduler.stats().swaps_in
    assert num_swaps > 40, "nothing was swapped"
