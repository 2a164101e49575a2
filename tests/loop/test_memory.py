"""A device that runs out of memory in a step: the next core has a smaller cache, and its sequences go on in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from front_harness import CONFIG, Collector, NumberText, Recorder, generation

from pageflight.core.config import EngineConfig
from pageflight.core.errors import EngineLost, PoisonRequest, PromptTooLong
from pageflight.loop.core_process import CoreSpec, FakeEngine
from pageflight.loop.front import Front, Generation
from pageflight.loop.local import start_core
from pageflight.loop.reports import CacheSize
from pageflight.loop.status import CoreStatus, read_status
from pageflight.loop.supervisor import SupervisorConfig
from pageflight.runners.fake import fake_continuation
from pageflight.runners.faulty import Fault

VOCAB_SIZE = 50_000
LARGE = VOCAB_SIZE - 1
"""The id whose step does not find its memory."""


@contextmanager
def core(above_blocks: int, config: EngineConfig = CONFIG) -> Iterator[tuple[Front, Recorder]]:
    fault = Fault(token_id=LARGE, kind="memory", above_blocks=above_blocks)
    recorder = Recorder()
    spec = CoreSpec(config=config, fake=FakeEngine(vocab_size=VOCAB_SIZE, faults=(fault,), step_s=0.002))
    with start_core(spec, NumberText(), recorder, supervision=SupervisorConfig(backoff_s=0.01)) as front:
        yield front, recorder


def status_of(front: Front) -> CoreStatus:
    status = read_status(front._address.status)
    assert status is not None
    return status


def begun(front: Front, wanted: Generation) -> Collector:
    sink = Collector()
    front.submit(wanted, sink)
    sink.wait(lambda: sink.num_ids > 2)
    return sink


def expected(wanted: Generation) -> tuple[int, ...]:
    return tuple(fake_continuation(wanted.prompt_ids, wanted.sampling, vocab_size=VOCAB_SIZE))


def test_the_cache_shrinks_until_the_step_fits_and_every_sequence_goes_on() -> None:
    """The next core had the same cache and died of the same step, until its sequences were given up as poison."""
    others = [generation((index, 2, 3), max_tokens=300) for index in range(3)]
    large = generation((LARGE, 5), max_tokens=20)
    with core(above_blocks=210) as (front, recorder):
        sinks = [begun(front, wanted) for wanted in others]
        sink = Collector()
        front.submit(large, sink)
        for wanted, each in zip((*others, large), (*sinks, sink), strict=True):
            assert each.wait().finals[0].error is None and each.ids() == expected(wanted)
        status = status_of(front)
        assert (status.shrinks, status.restarts, status.num_blocks) == (2, 2, 207), "256, 230, 207"
        assert recorder.num_poisoned == 0


def test_what_the_smaller_cache_cannot_hold_is_refused_with_the_reason() -> None:
    """A sequence of full length would have been replayed, never admitted, and replayed again."""
    config = replace(CONFIG, kv=replace(CONFIG.kv, num_blocks=64))
    short = generation((1, 2, 3), max_tokens=300)
    with core(above_blocks=60, config=config) as (front, _):
        long_sink = begun(front, generation((7, 8, 9), max_tokens=1000))
        sinks = [begun(front, short), Collector()]
        large = generation((LARGE, 5), max_tokens=20)
        front.submit(large, sinks[1])
        error = long_sink.wait().finals[0].error
        assert isinstance(error, EngineLost), error
        assert "at most 910 after 3 prompt tokens" in str(error)
        assert [sink.wait().ids() for sink in sinks] == [expected(short), expected(large)]
        with pytest.raises(PromptTooLong):
            refused = Collector()
            front.submit(generation((7, 8, 9), max_tokens=1000), refused)
            raise refused.wait().finals[0].error or AssertionError("nobody refused it")


def test_a_request_that_no_cache_is_small_enough_for_is_given_up_alone() -> None:
    """A cache that shrinks for ever serves nobody; at half its size the request is to blame."""
    other, large = generation((1, 2, 3), max_tokens=400), generation((LARGE, 5), max_tokens=20)
    with core(above_blocks=0) as (front, _):
        sinks = begun(front, other), Collector()
        front.submit(large, sinks[1])
        assert sinks[0].wait().ids() == expected(other)
        assert isinstance(sinks[1].wait().finals[0].error, PoisonRequest)
        assert status_of(front).num_blocks >= 128


def test_a_cache_always_keeps_a_block() -> None:
    assert CacheSize(num_blocks=1, max_sequence_len=9, block_size=16).shrunk().num_blocks == 1
