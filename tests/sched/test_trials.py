"""Sequences in whose steps a core has died run alone at first."""

from __future__ import annotations

import pytest
from sched_harness import VOCAB_SIZE, Harness

from pageflight.core.plan import StepPlan
from pageflight.sched.trials import TRIAL_TOKENS


def prompt(length: int, first: int = 0) -> list[int]:
    return [(first + position) % VOCAB_SIZE for position in range(length)]


def handles(harness: Harness, plan: StepPlan | None) -> list[int]:
    assert plan is not None
    return harness.scheduler.handles[plan.rows].tolist()


def test_a_suspect_is_alone_in_its_steps_until_its_second_token() -> None:
    """A prompt in chunks, the token after it, and the step that feeds that token back; then all go on together."""
    harness = Harness(max_num_tokens=8, prefix_cache=False)
    innocents = [harness.submit(prompt(4, first), max_tokens=8) for first in range(2)]
    assert handles(harness, harness.step()) == innocents
    suspects = [harness.submit(prompt(12, first), max_tokens=8, trial_tokens=TRIAL_TOKENS) for first in (3, 5)]
    for suspect in suspects:
        for _ in range(2 + TRIAL_TOKENS - 1):  # the prompt takes two steps
            assert handles(harness, harness.step()) == [suspect]
        assert len(harness.output_ids[suspect]) == TRIAL_TOKENS
    assert sorted(handles(harness, harness.step())) == innocents + suspects
    harness.run()
    harness.verify()


def test_steps_planned_ahead_keep_the_suspect_alone() -> None:
    harness = Harness(ahead=2, prefix_cache=False)
    innocent = harness.submit(prompt(4), max_tokens=12)
    suspect = harness.submit(prompt(4, 2), max_tokens=6, trial_tokens=TRIAL_TOKENS)
    for _ in range(TRIAL_TOKENS):
        assert handles(harness, harness.step()) == [suspect]
    harness.step()
    assert innocent in handles(harness, harness.step())
    harness.run()
    harness.verify()


def test_a_suspect_takes_rows_and_blocks_from_others_if_it_must() -> None:
    """The cache was full of sequences that stood still for it: nothing moved any more."""
    harness = Harness(num_blocks=7, max_num_seqs=2, max_num_tokens=20, prefix_cache=False)
    others = [harness.submit(prompt(8, first), max_tokens=8) for first in range(2)]
    harness.step()
    harness.step()
    suspect = harness.submit(prompt(20, 1), max_tokens=8, trial_tokens=TRIAL_TOKENS)
    assert handles(harness, harness.step()) == [suspect]
    assert harness.scheduler.stats().num_preempted == 2
    harness.run()
    harness.verify()
    assert {harness.finished[handle].reason for handle in (*others, suspect)} == {"length"}


def test_a_trial_lasts_as_long_as_it_was_asked_for() -> None:
    """Who strikes at every 16th position was always among others again by then."""
    harness = Harness(prefix_cache=False)
    innocent = harness.submit(prompt(4), max_tokens=40)
    suspect = harness.submit(prompt(4, 2), max_tokens=40, trial_tokens=18)
    for _ in range(18):
        assert handles(harness, harness.step()) == [suspect]
    assert sorted(handles(harness, harness.step())) == [innocent, suspect]


def test_the_accused_is_not_the_one_that_makes_room() -> None:
    """With the worst rank it lost its own row when blocks ran out, waited, and ran among others, its trial not over."""
    harness = Harness(num_blocks=6, max_num_seqs=3, max_num_tokens=20, prefix_cache=False, kv_admission="optimistic")
    others = [harness.submit(prompt(8, first), max_tokens=8) for first in range(2)]
    harness.step()
    suspect = harness.submit(prompt(3, 1), max_tokens=12, priority=-5, trial_tokens=10)
    for _ in range(10):
        assert handles(harness, harness.step()) == [suspect]
    harness.run()
    harness.verify()
    assert {harness.finished[handle].reason for handle in (*others, suspect)} == {"length"}


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_a_trial_ends_with_its_sequence(max_tokens: int) -> None:
    """The accused had no third token to be cleared by, and its trial never ended."""
    harness = Harness()
    harness.submit(prompt(4), max_tokens=6)
    suspect = harness.submit(prompt(5), max_tokens=max_tokens, trial_tokens=TRIAL_TOKENS)
    for _ in range(max_tokens):
        assert handles(harness, harness.step()) == [suspect]
    assert harness.scheduler.accused is None
    harness.run()
    harness.verify()


def test_suspects_can_be_cancelled_and_run_late_like_any_other() -> None:
    """In every place: held back, in the middle of the prompt, between its two tokens."""
    harness = Harness(max_num_tokens=8)
    running, late, held = (
        harness.submit(
            prompt(12, first), max_tokens=6, trial_tokens=TRIAL_TOKENS, deadline_s=5.0 if first == 1 else None
        )
        for first in range(3)
    )
    harness.step()
    assert harness.cancel(held) and harness.cancel(running)
    harness.clock.advance(6.0)
    assert harness.step() is None
    assert harness.finished[late].reason == "deadline"
    harness.run()


def test_several_sequences_of_one_suspect_request_all_get_their_tokens() -> None:
    """A core hands over sequences one by one, but nothing forbids a request of several."""
    harness = Harness()
    harness.submit(prompt(5), n=3, temperature=1.0, max_tokens=5, trial_tokens=TRIAL_TOKENS)
    harness.submit(prompt(5), max_tokens=5)
    harness.run()
    harness.verify()
