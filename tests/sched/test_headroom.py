"""When a waiting sequence may start beside those that run and grow."""

from __future__ import annotations

import numpy as np
import pytest
from sched_harness import VOCAB_SIZE, Harness

from pageflight.sched.forecast import REMEMBERED, UNKNOWN_SHARE, Forecast


def test_a_sequence_is_expected_to_end_as_those_did_that_were_longer() -> None:
    """The mean of all answers said of a sequence beyond it that it had ended already."""
    forecast = Forecast(block_size=4)
    for length in (10, 20, 60):
        forecast.learn(length)
    remaining = forecast.remaining(np.array([0, 10, 19, 20, 59]), np.array([100, 100, 100, 100, 100]))
    assert remaining.tolist() == [30, 30, 21, 40, 1]
    assert forecast.remaining(np.array([0, 59]), np.array([7, 59])).tolist() == [7, 0], "never beyond its limit"


def test_what_no_answer_has_shown_is_a_share_of_what_is_left() -> None:
    forecast = Forecast(block_size=4)
    assert forecast.remaining(np.array([0]), np.array([80])).tolist() == [80 * UNKNOWN_SHARE]
    forecast.learn(30)
    assert forecast.remaining(np.array([30]), np.array([80])).tolist() == [50 * UNKNOWN_SHARE]


def test_old_answers_are_forgotten() -> None:
    """A night of batch jobs with long answers held the short ones of the day up for ever."""
    forecast = Forecast(block_size=4)
    for length in [1000] * REMEMBERED + [10] * REMEMBERED:
        forecast.learn(length)
    assert forecast.remaining(np.array([0]), np.array([2000])).tolist() == [10]


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
