"""When a waiting sequence may start beside those that run and grow."""

from __future__ import annotations

import numpy as np
import pytest
from sched_harness import VOCAB_SIZE, Harness

from pageflight.sched.forecast import REMEMBERED, Forecast

SERIALS = np.arange(1000)


def test_a_sequence_is_expected_to_end_as_those_did_that_were_longer() -> None:
    """The mean of all answers said of a sequence beyond it that it had ended already."""
    forecast, none = Forecast(block_size=4), np.zeros(1000, np.int64)
    for length in (10, 20, 60):
        forecast.learn(length)
    fresh = forecast.remaining(SERIALS, none, none + 100)
    shares = [float((fresh == length).mean()) for length in (10, 20, 60)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.01), "as many of each length as there were"
    older = forecast.remaining(SERIALS, none + 10, none + 100)
    assert [float((older == length - 10).mean()) for length in (20, 60)] == pytest.approx([0.5] * 2, abs=0.01)
    assert (forecast.remaining(SERIALS, none + 20, none + 100) == 40).all()
    assert (forecast.remaining(SERIALS, none + 59, none + 59) == 0).all(), "never beyond its limit"


def test_what_no_answer_has_shown_may_be_anything_up_to_the_limit() -> None:
    """Half of the limit was expected of all, which clients set far above what they use: the engine stood half empty."""
    forecast = Forecast(block_size=4)
    done, limit = np.full(1000, 30), np.full(1000, 80)
    for num_learnt in range(2):  # nothing, then one that was no longer
        expected = forecast.remaining(SERIALS, done, limit)
        assert np.sort(expected) == pytest.approx(np.linspace(0, 50, 1000), abs=0.2), num_learnt
        forecast.learn(30)


def test_what_is_expected_of_a_sequence_does_not_jump_about() -> None:
    """The plan of a step must follow from the calls before it, and a forecast that changes its mind is none."""
    forecast = Forecast(block_size=4)
    for length in range(10, 110):
        forecast.learn(length)
    ages = np.arange(0, 100, 5)
    for serial in range(20):
        ends = ages + forecast.remaining(np.full(20, serial), ages, np.full(20, 200))
        assert (np.diff(ends) >= 0).all(), "older sequences end later"


def test_old_answers_are_forgotten() -> None:
    """A night of batch jobs with long answers held the short ones of the day up for ever."""
    forecast = Forecast(block_size=4)
    for length in [1000] * REMEMBERED + [10] * REMEMBERED:
        forecast.learn(length)
    assert (forecast.remaining(SERIALS, np.zeros(1000, np.int64), np.full(1000, 2000)) == 10).all()


def test_equal_prospects_do_not_end_all_at_once() -> None:
    """Every new sequence was expected to be as long as the mean: together they seemed to need half as much again."""
    forecast = Forecast(block_size=1)
    for length in range(100, 300):
        forecast.learn(length)
    none = np.zeros(64, np.int64)
    peak = forecast.peak_blocks(none, forecast.remaining(np.arange(64), none, none + 1000))
    as_the_mean = forecast.peak_blocks(none, np.full(64, 200.0))
    assert 100 * 64 < peak < 0.8 * as_the_mean


def test_the_peak_counts_what_is_free_again_when_the_next_one_grows() -> None:
    """The sum of all full lengths asks for room that is never needed at the same time."""
    forecast, half = Forecast(block_size=1), 0.5
    tokens, remaining = np.array([10, 10, 10]), np.array([30.0, 20.0, 1.0])
    at_the_end_of_each = [10 + 30 + half, 20 + 2 * 20 + 2 * half, 30 + 3 * 1 + 3 * half]
    assert forecast.peak_blocks(tokens, remaining) == max(at_the_end_of_each) == 61
    assert forecast.peak_blocks(tokens[::-1], remaining[::-1]) == 61, "in any order"


def crowd(kv_admission: str, **settings: int) -> Harness:
    """Answers of 60 tokens to prompts of 4: eight rows want 128 blocks of 4 at once and have 60."""
    harness = Harness(
        block_size=4,
        num_blocks=60,
        max_num_seqs=8,
        max_num_tokens=32,
        max_model_len=80,
        step_s=0.01,
        kv_admission=kv_admission,
        **settings,
    )
    for index in range(24):
        harness.submit([(index + position) % VOCAB_SIZE for position in range(4)], max_tokens=60)
    harness.run()
    harness.verify()
    return harness


def test_a_forecast_leaves_most_sequences_their_blocks() -> None:
    """Sequences were started that had to be preempted, and were started again to be preempted again."""
    harnesses = {mode: crowd(mode) for mode in ("optimistic", "forecast", "reserve")}
    preemptions = {mode: harness.scheduler.stats().preemptions for mode, harness in harnesses.items()}
    assert preemptions["reserve"] == 0
    assert preemptions["forecast"] * 3 <= preemptions["optimistic"]


def test_a_forecast_counts_on_room_in_the_host_tier() -> None:
    """With a place for swapped sequences a preemption costs little, and waiting for room costs more."""
    alone, with_host = crowd("forecast"), crowd("forecast", num_host_blocks=200)
    assert len(with_host.plans) < len(alone.plans)
    assert with_host.scheduler.stats().recomputed_tokens == 0


@pytest.mark.parametrize("kv_admission", ["forecast", "optimistic", "reserve"])
def test_a_sequence_that_needs_the_whole_cache_starts_when_nothing_runs(kv_admission: str) -> None:
    """The watermark, or a forecast rounded up, kept a request waiting for ever that fits exactly."""
    harness = Harness(block_size=4, num_blocks=10, max_model_len=64, kv_admission=kv_admission, kv_watermark=0.2)
    harness.submit([1] * 38, max_tokens=3)
    harness.run()
    harness.verify()
