from __future__ import annotations

from dataclasses import replace

import pytest
from sched_harness import Harness

from pageflight.core.errors import Draining, InvalidArgument, PromptTooLong, QueueFull
from pageflight.core.request import Request, SamplingParams

GOOD = Request(handle=1, prompt_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=4))


def sampling(**changes: object) -> Request:
    return replace(GOOD, sampling=replace(GOOD.sampling, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (replace(GOOD, prompt_ids=()), ["prompt", "at least one"]),
        (replace(GOOD, prompt_ids=(1, 13)), ["prompt=13", "0 to 12"]),
        (replace(GOOD, prompt_ids=(1, -1)), ["prompt=-1"]),
        (replace(GOOD, prompt_ids=(1, 1 << 70)), ["prompt=1180591620717411303424"]),
        (replace(GOOD, prompt_ids=(1, (1 << 63) + 5)), ["prompt=9223372036854775813"]),
        (replace(GOOD, prompt_ids=(1, 2.5)), ["prompt=2.5"]),  # type: ignore[arg-type]
        (replace(GOOD, prompt_ids=(True,)), ["prompt=True"]),
        (replace(GOOD, output_ids=(99,)), ["prompt=99"]),
        (replace(GOOD, output_ids=(1,) * 5), ["output_ids=5", "max_tokens=4"]),
        (replace(GOOD, handle=-1), ["handle=-1"]),
        (replace(GOOD, handle=1 << 63), ["handle="]),
        (replace(GOOD, priority=1 << 40), ["priority="]),
        (replace(GOOD, kv_retention_priority=101), ["kv_retention_priority=101", "0 to 100"]),
        (replace(GOOD, kv_retention_priority=-1), ["kv_retention_priority=-1"]),
        (replace(GOOD, deadline_s=float("nan")), ["timeout_ms=nan"]),
        (sampling(max_tokens=0), ["max_tokens=0"]),
        (sampling(min_tokens=5), ["min_tokens=5", "max_tokens=4"]),
        (sampling(min_tokens=-1), ["min_tokens=-1"]),
        (sampling(n=0), ["n=0"]),
        (sampling(n=10**9), ["n=1000000000", "100"]),
        (sampling(stop_token_ids=(1, 1 << 40)), ["stop_token_ids=1099511627776"]),
        (replace(sampling(n=2), output_ids=(1,)), ["n=2"]),
    ],
)
def test_what_can_never_work_is_refused_with_option_value_and_limit(request_: Request, words: list[str]) -> None:
    """One bad number reached an int32 array as an OverflowError and took the core down with everyone's streams."""
    harness = Harness()
    with pytest.raises(InvalidArgument) as caught:
        harness.scheduler.submit(request_, 0.0)
    for word in words:
        assert word in str(caught.value)
    harness.scheduler.check()
    assert not harness.scheduler.has_work and harness.scheduler.stats().refusals == {"invalid_argument": 1}


def test_prompt_and_answer_must_fit_the_model() -> None:
    """The answer was cut in silence at the model's length."""
    harness = Harness(max_model_len=16, num_blocks=32)
    harness.submit([1] * 12, max_tokens=4)
    with pytest.raises(PromptTooLong, match="max_tokens=5: at most 4 after 12 prompt tokens: max_model_len holds 16"):
        harness.submit([1] * 12, max_tokens=5)
    with pytest.raises(PromptTooLong, match="prompt='16 tokens': at most 15"):
        harness.submit([1] * 16, max_tokens=1)
    harness.run()


def test_prompt_and_answer_must_fit_the_cache() -> None:
    """A request larger than the whole cache waited for ever, and everyone behind it."""
    harness = Harness(block_size=4, num_blocks=3, max_model_len=64)
    fits = harness.submit([1] * 10, max_tokens=3)
    with pytest.raises(PromptTooLong, match="the K/V cache holds 13"):
        harness.submit([1] * 10, max_tokens=4)
    harness.run()
    harness.verify()
    assert harness.finished[fits].reason == "length"


def test_the_queue_limit_counts_what_no_free_row_awaits() -> None:
    """Requests that the next step would have admitted were refused by an idle server."""
    harness = Harness(max_num_seqs=2, max_queue_size=3)
    for _ in range(5):
        harness.submit([1, 2], max_tokens=2)
    with pytest.raises(QueueFull, match="3 requests waiting, limit 3"):
        harness.submit([1, 2], max_tokens=2)
    harness.run()
    assert harness.scheduler.stats().refusals == {"queue_full": 1}


def test_a_cancelled_request_gives_its_place_in_the_queue_back() -> None:
    harness = Harness(max_num_seqs=1, max_queue_size=1)
    first = harness.submit([1, 2], max_tokens=2)
    harness.submit([1, 2], max_tokens=2)
    harness.cancel(first)
    harness.submit([1, 2], max_tokens=2)
    harness.run()


def test_draining_refuses_new_requests_and_finishes_open_ones() -> None:
    harness = Harness()
    handle = harness.submit([1, 2], max_tokens=5)
    harness.scheduler.drain()
    with pytest.raises(Draining):
        harness.submit([1, 2], max_tokens=5)
    harness.run()
    assert harness.finished[handle].reason == "length"


def test_a_handle_in_use_is_refused_and_the_open_sequence_goes_on() -> None:
    """The second sequence replaced the first in the table; the first never got its final event."""
    harness = Harness()
    handle = harness.submit([1, 2], n=2, temperature=1.0, max_tokens=5)
    with pytest.raises(InvalidArgument, match=f"handle={handle + 1}"):
        harness.scheduler.submit(replace(GOOD, handle=handle + 1), 0.0)
    harness.run()
    harness.verify()
