"""What one instance's queue has no room for is offered to the others, and refused when all are full."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import msgspec
import pytest
from front_harness import CONFIG, SLOW, Collector, NumberText, eventually, generation, run
from test_router import HELD, Instance, assert_undisturbed, beside, instance

from pageflight.core.errors import Cancelled, QueueFull
from pageflight.core.request import Request
from pageflight.loop.client import CoreClient
from pageflight.loop.core_link import CoreLink
from pageflight.loop.frames import Beat, CoreLimits, Hello
from pageflight.loop.open_sequence import Generation, OpenSequence, SharedStops
from pageflight.loop.router import Router, prefix_key, ranked_for

ROWS, QUEUE = 2, 3
SMALL_QUEUE = msgspec.structs.replace(
    SLOW, config=replace(CONFIG, scheduler=replace(CONFIG.scheduler, max_num_seqs=ROWS, max_queue_size=QUEUE))
)
FULL = ROWS + QUEUE
"""Sequences that one instance takes."""


@pytest.fixture(scope="module")
def small() -> Iterator[tuple[Instance, Instance, Instance]]:
    """Three instances with short queues."""
    with instance(SMALL_QUEUE) as first, instance(SMALL_QUEUE) as second, instance(SMALL_QUEUE) as third:
        yield first, second, third


def send(router: Router, wanted: list[Generation]) -> list[Collector]:
    sinks = [Collector(one.sampling.n) for one in wanted]
    for one, sink in zip(wanted, sinks, strict=True):
        router.submit(one, sink)
    return sinks


def same(number: int, count: int) -> list[Generation]:
    return [generation((number,) * 8, max_tokens=120) for _ in range(count)]


def test_what_a_full_instance_refuses_is_computed_by_one_with_room(small: tuple[Instance, ...]) -> None:
    """Half of a burst was refused with QueueFull while the other instance had nothing to do."""
    with beside(small[:2]) as (router, recorder):
        wanted = [*same(1, FULL), *same(2, FULL)]
        assert_undisturbed(send(router, wanted), wanted)
        assert recorder.refusals == [] and recorder.num_rerouted == 0 and len(recorder.ends) == 2 * FULL
        counts = Counter(recorder.instances)
        assert counts[0] == 2 * FULL and counts[1] >= 1, "each was offered to its own instance first"
        assert not router.num_open
        recorder.instances.clear()
        run(router, generation())  # type: ignore[arg-type]
        assert recorder.instances == [0], "where there is room, nothing is spread"


def test_a_request_is_refused_when_all_instances_are_full(small: tuple[Instance, ...]) -> None:
    """It must end, with the error it always had, and be counted once, however many have refused it."""
    with beside(small) as (router, recorder):
        wanted = [replace(one, sampling=replace(one.sampling, max_tokens=300)) for one in same(1, 3 * FULL)]
        sinks = send(router, wanted)
        eventually(lambda: [router._num_open(number) for number in range(3)] == [FULL] * 3, "all are full")
        late = send(router, same(3, 1))[0].wait()
        error = late.finals[0].error
        assert isinstance(error, QueueFull) and f"{QUEUE} requests waiting, limit {QUEUE}" in str(error)
        assert late.num_ids == 0 and recorder.refusals == ["QueueFull"]
        assert_undisturbed(sinks, wanted)
        assert len(recorder.ends) == 3 * FULL


def test_sequences_of_one_request_go_on_together_and_are_cancelled_together(small: tuple[Instance, ...]) -> None:
    """Half of `n` in another instance would have been a request that nobody could end."""
    several = generation((7, 7), max_tokens=700, n=QUEUE)
    with beside(small[:2]) as (router, recorder):
        first = send(router, same(1, FULL))
        sink = Collector(QUEUE)
        number = router.submit(several, sink)
        sink.wait(lambda: sink.num_ids > 5)
        assert recorder.instances[-2:] == [0, 1]
        router.cancel(number)
        assert [type(final.error) for final in sink.wait().finals.values()] == [Cancelled] * QUEUE
        assert_undisturbed(first, same(1, FULL))
        assert not router.num_open and recorder.refusals == []


def test_a_conversation_overflows_to_its_own_second_choice(small: tuple[Instance, ...]) -> None:
    """Next to the least busy one, it would have left K/V blocks in each instance in turn."""
    with beside(small, affinity="prefix") as (router, recorder):
        wanted = same(5, FULL + 1)
        assert_undisturbed(send(router, wanted), wanted)
        ranked = ranked_for(prefix_key(wanted[0]), 3)
        assert recorder.instances == [ranked[0]] * (FULL + 1) + [ranked[1]]


def test_a_correlation_id_names_the_second_choice_too(small: tuple[Instance, ...]) -> None:
    """The id was known where the request came in, and not where it was sent on."""
    session = "a"
    by_name = ranked_for(session.encode(), 3)
    while ranked_for(prefix_key(generation((6,))), 3)[:2] == by_name[:2]:
        session += "a"
        by_name = ranked_for(session.encode(), 3)
    with beside(small, affinity="correlation") as (router, recorder):
        sinks = [Collector() for _ in range(FULL + 1)]
        for sink in sinks:
            router.submit(generation((6,), max_tokens=120), sink, session)
        for sink in sinks:
            sink.wait()
        assert recorder.instances == [by_name[0]] * (FULL + 1) + [by_name[1]]


def test_while_no_core_answers_every_queue_is_used() -> None:
    """All requests waited in the first queue, and were refused while another's was empty."""
    with (
        instance(SMALL_QUEUE, HELD) as first,
        instance(SMALL_QUEUE, HELD) as second,
        beside([first, second], reroute_after_s=60.0) as (router, recorder),
    ):
        assert router._reachable(1) is not None
        first.kill()
        second.kill()
        eventually(lambda: not router.is_ready, "both deaths are noticed")
        send(router, same(1, 2 * FULL))
        assert Counter(recorder.instances) == {0: FULL, 1: FULL} and recorder.refusals == []
        with pytest.raises(QueueFull):
            router.submit(same(1, 1)[0], Collector())
        assert recorder.refusals == ["QueueFull"]


def test_what_is_cancelled_on_its_way_to_another_instance_stays(small: tuple[Instance, ...]) -> None:
    """The other front took it and sent its core nothing: it had no end."""
    wanted = generation((4, 4))
    with beside(small[:1]) as (router, _):
        sequence = OpenSequence(wanted, Collector(), SharedStops.of(wanted), NumberText(), leader=9, index=0)
        sequence.ending = "cancelled"
        assert not router._home.adopt([sequence]) and not router.num_open
        sequence.ending = None
        assert router._home.adopt([sequence])
        eventually(lambda: not router.num_open, "it has been computed")


class SilentClient(CoreClient):
    """A line to nobody."""

    def __init__(self) -> None:
        self.identity = b"front"

    def send(self, command: object) -> None:
        pass


def test_what_a_core_has_refused_it_has_not_accepted() -> None:
    """The refusing core's count of what it had read made the request an accepted one, which every queue takes."""
    link = CoreLink(SilentClient())
    limits = CoreLimits(max_model_len=8, num_blocks=4, block_size=4, vocab_size=9, max_num_seqs=1, max_queue_size=1)
    link.meet(Hello(1, 77, 1, limits, 0))
    wanted = generation((1,))
    one, other = (
        OpenSequence(wanted, Collector(), SharedStops.of(wanted), NumberText(), leader=leader, index=0)
        for leader in (0, 1)
    )
    for sequence in (one, other):
        link.submit(Request(handle=sequence.handle, prompt_ids=(1,), sampling=wanted.sampling), [sequence])
    one.refused_by.add(77)
    link.confirm(Beat(77, 2))
    assert not one.is_accepted and other.is_accepted
