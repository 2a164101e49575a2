"""Tokens that come faster than responses may be sent are joined, and nothing of a stream is lost or late by that."""

from __future__ import annotations

import pytest
from front_harness import SLOW, Collector, NumberText, generation

from pageflight.core.config import EngineConfig
from pageflight.core.errors import ConfigError
from pageflight.loop import pacing
from pageflight.loop.core_process import CoreSpec
from pageflight.loop.local import start_core
from pageflight.loop.pacing import Pacing


def paced(spec: CoreSpec, response_rate: int | None, num_streams: int, num_tokens: int) -> list[Collector]:
    """What so many streams are told by a front of this rate."""
    collectors = [Collector() for _ in range(num_streams)]
    with start_core(spec, NumberText(), response_rate=response_rate) as front:
        for number, collector in enumerate(collectors):
            front.submit(generation([number + 1], max_tokens=num_tokens, stream=True), collector)
        for collector in collectors:
            collector.wait()
    return collectors


def words(collector: Collector) -> tuple[str, tuple[int, ...]]:
    return "".join(e.text for e in collector.events), tuple(i for e in collector.events for i in e.ids)


def test_fewer_responses_say_the_same():
    """16 streams of 40 tokens, 4 ms a step, 40 responses a second: text and ids are whole, in far fewer pieces."""
    slow = paced(SLOW, 40, 16, 40)
    free = paced(SLOW, None, 16, 40)
    assert [words(one) for one in slow] == [words(one) for one in free]
    assert sum(len(one.events) for one in slow) < sum(len(one.events) for one in free) / 4


def test_the_first_token_goes_out_alone():
    """However crowded, nobody waits for company with a first token."""
    for collector in paced(SLOW, 20, 8, 30):
        assert len(collector.events[0].ids) <= 2, "only what one frame of the core brought"
        assert len(collector.events) > 1


def test_a_stream_that_stands_still_is_told_what_it_has(monkeypatch):
    """A core that hangs after some tokens must not keep back those that were computed."""
    monkeypatch.setattr(pacing, "MAX_INTERVAL_S", 1000.0)
    collector = Collector()
    slow = CoreSpec(config=EngineConfig(kv=SLOW.config.kv, scheduler=SLOW.config.scheduler), fake=SLOW.fake)
    with start_core(slow, NumberText(), response_rate=1) as front:
        front.submit(generation([5], max_tokens=400, stream=True), collector)
        collector.wait(lambda: len(collector.events) >= 3)  # the first token, then what was overdue, again and again
    told = [event for event in collector.events if not event.final]
    assert len(told[0].ids) < len(told[1].ids)


def test_one_stream_alone_is_never_joined():
    """A single reader sees every token as it comes: the default share is far from used up."""
    (collector,) = paced(SLOW, 0, 1, 30)
    assert sum(len(event.ids) for event in collector.events[:10]) <= 12


@pytest.mark.parametrize(
    ("rate", "streams", "expected_ms"), [(None, 500, 0), (100, 1, 10), (100, 5, 50), (100, 50, 100)]
)
def test_the_interval_follows_the_number_of_streams_up_to_a_limit(rate, streams, expected_ms):
    assert Pacing(rate).interval_ns(streams) == expected_ms * 1_000_000


def test_a_negative_rate_is_refused():
    with pytest.raises(ConfigError, match="response_rate=-1"):
        Pacing(-1)
