"""Several cores behind one front: a request goes where it should, and on where its core is gone."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import msgspec
import pytest
from front_harness import CONFIG, SLOW, Collector, NumberText, Recorder, eventually, generation, run
from hypothesis import given
from hypothesis import strategies as st

from pageflight.core.config import SessionAffinity
from pageflight.core.errors import Cancelled, DeadlineExceeded, Draining, EngineLost, PoisonRequest
from pageflight.loop.address import CoreAddress, private_address
from pageflight.loop.core_process import CoreSpec, FakeEngine, core_command
from pageflight.loop.local import find_python
from pageflight.loop.open_sequence import Generation, OpenSequence, SharedStops
from pageflight.loop.outbox import Outbox
from pageflight.loop.pacing import Pacing
from pageflight.loop.reports import DRAIN_SIGNAL, CacheSize
from pageflight.loop.router import PREFIX_TOKENS, Router, Routing, prefix_key, ranked_for
from pageflight.loop.supervisor import Supervisor, SupervisorConfig
from pageflight.runners.fake import fake_continuation
from pageflight.runners.faulty import Fault

HELD = CoreSpec(config=CONFIG, fake=FakeEngine(start_s=600.0))
"""A core that does not come back."""
SMALL = msgspec.structs.replace(SLOW, config=replace(CONFIG, kv=replace(CONFIG.kv, num_blocks=2)))
"""Its cache holds 33 tokens."""
BROKEN = CoreSpec(config=CONFIG)
"""One that cannot: it has neither an engine nor a fake."""


@dataclass
class Instance:
    """A supervised core, of which every life but the first may be another."""

    address: CoreAddress
    supervisor: Supervisor

    def kill(self) -> None:
        os.kill(self.supervisor.status.core_pid, signal.SIGKILL)


@contextmanager
def instance(*lives: CoreSpec) -> Iterator[Instance]:
    address, python, starts = private_address(), find_python(), []

    def command(report_fd: int, trace_fd: int, cache: CacheSize | None) -> list[str]:
        starts.append(report_fd)
        spec = lives[min(len(starts), len(lives)) - 1]
        return core_command(python, spec, address, report_fd, trace_fd, cache if spec is not SMALL else None)

    config = SupervisorConfig(backoff_s=0.01, max_killed_starts=1)
    supervisor = Supervisor(command, address, environment=dict(os.environ), config=config)
    supervisor.start()
    try:
        supervisor.wait_ready(60)
        yield Instance(address, supervisor)
    finally:
        supervisor.close(0.0)


@contextmanager
def routed(
    *instances: Sequence[CoreSpec], reroute_after_s: float = 0.2
) -> Iterator[tuple[Router, list[Instance], Recorder]]:
    """A router to instances of these lives."""
    with ExitStack() as stack:
        made = [stack.enter_context(instance(*lives)) for lives in instances]
        with beside(made, reroute_after_s=reroute_after_s) as (router, recorder):
            yield router, made, recorder


@contextmanager
def beside(
    instances: Sequence[Instance], *, home: int = 0, affinity: SessionAffinity = "none", reroute_after_s: float = 0.2
) -> Iterator[tuple[Router, Recorder]]:
    """A router of another process to instances that are there."""
    recorder = Recorder()
    routing = Routing(home=home, session_affinity=affinity, reroute_after_s=reroute_after_s)
    router = Router([one.address for one in instances], NumberText(), recorder, routing=routing)
    try:
        router.wait_ready(60)
        yield router, recorder
    finally:
        router.close(0.0)


@pytest.fixture(scope="module")
def calm() -> Iterator[tuple[Instance, Instance]]:
    """Two instances that nobody kills."""
    with instance(SLOW) as first, instance(SLOW) as second:
        yield first, second


WANTED = (
    generation((1, 2, 3) * 20, max_tokens=90),
    generation((2, 2), max_tokens=80, temperature=1.0, seed=5, log_probs=True),
    generation((3, 1) * 9, max_tokens=70, n=3, temperature=0.7, seed=1),
    generation((4, 4, 4), max_tokens=85, stop=("0,",), min_tokens=60),
    generation((5,) * 40, max_tokens=60, stream=False),
)


def streams(router: Router, wanted: Sequence[Generation] = WANTED) -> list[Collector]:
    """Of all of which some has come."""
    sinks = [Collector(one.sampling.n) for one in wanted]
    for one, sink in zip(wanted, sinks, strict=True):
        router.submit(one, sink)
    for one, sink in zip(wanted, sinks, strict=True):
        if one.stream:
            sink.wait(lambda sink=sink: sink.num_ids > 5)
    return sinks


def assert_undisturbed(sinks: Sequence[Collector], wanted: Sequence[Generation] = WANTED) -> None:
    """What one core that never dies gives: no id and no character less, more, or other."""
    for one, sink in zip(wanted, sinks, strict=True):
        sink.wait()
        for index in range(one.sampling.n):
            ids = fake_continuation(one.prompt_ids, one.sampling, sequence_index=index, vocab_size=400)
            got = sink.ids(index)
            if sink.finals[index].finish_reason == "stop":
                assert one.stop and len(got) >= one.sampling.min_tokens
                ids = ids[: len(got)]
            assert sink.finals[index].error is None and got == tuple(ids)
            assert sink.text(index).count(",") in (len(ids), len(ids) - 1)


def test_a_request_goes_to_the_core_of_its_own_instance(calm: tuple[Instance, Instance]) -> None:
    """Triton spreads requests; spreading them once more would only add a connection for each pair of instances."""
    with beside(calm, home=1) as (router, recorder):
        assert_undisturbed(streams(router))
        assert set(recorder.instances) == {1} and list(router._fronts) == [1]


@pytest.mark.parametrize("after", [HELD, BROKEN], ids=["held dead", "lost for good"])
def test_what_a_dead_core_had_open_goes_on_in_another(after: CoreSpec) -> None:
    """Its sequences waited for ever, or ended with EngineLost, while another instance had nothing to do."""
    reroute_after_s = 0.2 if after is HELD else 1000.0  # who is lost is not waited for
    with routed((SLOW, after), (SLOW,), reroute_after_s=reroute_after_s) as (router, (first, _), recorder):
        sinks = streams(router)
        first.kill()
        assert_undisturbed(sinks)
        assert recorder.num_rerouted == sum(one.sampling.n for one in WANTED)
        assert router.is_ready and not router.home_is_ready and not router.num_open
        assert recorder.refusals == [] and len(recorder.ends) == recorder.num_rerouted
        recorder.instances.clear()
        assert_undisturbed(streams(router))
        assert set(recorder.instances) == {1}, "it has left the rotation"


def test_a_core_that_comes_back_in_time_keeps_its_sequences() -> None:
    """Its K/V blocks would have been computed elsewhere while it took one second to start."""
    with routed((SLOW,), (SLOW,), reroute_after_s=60.0) as (router, (first, _), recorder):
        sinks = streams(router)
        first.kill()
        eventually(lambda: not router.home_is_ready, "the death is noticed")
        late = Collector()
        router.submit(WANTED[0], late)
        assert_undisturbed([*sinks, late], [*WANTED, WANTED[0]])
        assert recorder.num_rerouted == 0 and sum(replayed for _, replayed in recorder.restarts) == 7
        assert Counter(recorder.instances) == {0: len(WANTED), 1: 1}, "new requests do not wait for it"
        eventually(lambda: router.home_is_ready, "it is back")
        run(router, generation())  # type: ignore[arg-type]
        assert recorder.instances[-1] == 0, "and in the rotation"


def test_what_the_next_core_of_an_instance_has_no_room_for_goes_on_in_another() -> None:
    """It came back with less memory and ended valid requests, which another instance had room for."""
    with routed((SLOW, SMALL), (SLOW,), reroute_after_s=60.0) as (router, (first, _), recorder):
        sinks = streams(router)
        first.kill()
        assert_undisturbed(sinks)
        assert recorder.num_rerouted == sum(one.sampling.n for one in WANTED) and recorder.refusals == []


def test_a_core_that_drains_is_no_place_to_go_on() -> None:
    """Its model was being loaded again: what came from a dead core ended with Draining, a word about the server."""
    with routed((SLOW, HELD), (SLOW,)) as (router, (first, second), recorder):
        sinks = streams(router)
        busy = Collector()
        front = router._reachable(1)
        assert front is not None
        front.submit(generation((8, 8), max_tokens=150), busy)
        busy.wait(lambda: busy.num_ids > 5)
        os.kill(second.supervisor.status.core_pid, DRAIN_SIGNAL)
        first.kill()
        new = Collector()
        eventually(lambda: front._core.is_leaving, "it has refused something")
        router.submit(WANTED[0], new)
        assert_undisturbed([*sinks, new], [*WANTED, WANTED[0]])
        assert busy.wait().num_ids == 150 and second.supervisor.status.restarts == 1
        assert recorder.refusals == []


def test_sequences_go_from_core_to_core_as_often_as_it_takes() -> None:
    with routed((SLOW, HELD), (SLOW, HELD), (SLOW,)) as (router, cores, recorder):
        sinks = streams(router)
        cores[0].kill()
        eventually(lambda: recorder.num_rerouted > 0, "they go on")
        home_of = next(number for number in (1, 2) if router._fronts.get(number) is not None)
        for sink in sinks[:1]:
            count = sink.num_ids
            sink.wait(lambda sink=sink, count=count: sink.num_ids > count + 3)
        if home_of == 1:
            cores[1].kill()
        assert_undisturbed(sinks)


def test_a_sequence_that_has_moved_is_cancelled_late_and_cut_off_like_any_other() -> None:
    """Its number was known to the front that had it before."""
    wanted = generation((7, 7), max_tokens=700)
    with routed((SLOW, HELD), (SLOW,)) as (router, (first, _), recorder):
        sinks = [Collector() for _ in range(3)]
        cancelled, _, _ = (
            router.submit(one, sink)
            for one, sink in zip([wanted, replace(wanted, timeout_ms=1500), wanted], sinks, strict=True)
        )
        for sink in sinks:
            sink.wait(lambda sink=sink: sink.num_ids > 5)
        first.kill()
        eventually(lambda: recorder.num_rerouted == 3, "they go on")
        counts = [sink.num_ids for sink in sinks]
        for sink, count in zip(sinks, counts, strict=True):
            sink.wait(lambda sink=sink, count=count: sink.num_ids > count)
        router.cancel(cancelled)
        assert isinstance(sinks[0].wait().finals[0].error, Cancelled)
        assert isinstance(sinks[1].wait().finals[0].error, DeadlineExceeded)
        router.cut_off()
        assert isinstance(sinks[2].wait().finals[0].error, Draining)


def test_nobody_takes_over_where_nobody_is_left() -> None:
    with routed((SLOW, BROKEN), (SLOW, BROKEN)) as (router, cores, _):
        sinks = streams(router, WANTED[:2])
        for one in cores:
            one.kill()
        for sink in sinks:
            assert isinstance(sink.wait().finals[0].error, EngineLost)
        assert not router.is_ready
        with pytest.raises(EngineLost):
            router.submit(WANTED[0], Collector())


def test_a_request_that_crashes_cores_is_known_for_it_wherever_it_goes() -> None:
    """It was innocent again in every instance, and crashed each of them as often as the first."""
    fault = Fault(token_id=77, kind="raise")
    deadly = CoreSpec(config=CONFIG, fake=FakeEngine(step_s=0.004, faults=(fault,)))
    with routed((deadly, HELD), (deadly,)) as (router, cores, recorder):
        sink = Collector()
        router.submit(generation((77, 1, 2), max_tokens=50), sink)
        assert isinstance(sink.wait().finals[0].error, PoisonRequest)
        assert recorder.num_poisoned == 1 and recorder.num_rerouted == 1
        assert [one.supervisor.status.restarts for one in cores] == [1, 2], "three crashes, as with one core"
        run(router, generation())  # type: ignore[arg-type]


def test_draining_waits_for_every_core(calm: tuple[Instance, Instance]) -> None:
    with beside(calm, affinity="prefix") as (router, recorder):
        wanted = [generation((number,) * 8, max_tokens=60) for number in range(8)]
        sinks = streams(router, wanted)
        assert len(set(recorder.instances)) == 2
        router.close(60.0)
        assert_undisturbed(sinks, wanted)
        with pytest.raises(Draining):
            router.submit(wanted[0], Collector())


def test_an_instance_without_its_core_serves_with_those_of_others(calm: tuple[Instance, Instance]) -> None:
    """A stub that was loaded again while its core was away waited a minute for it."""
    away = Instance(private_address(), calm[0].supervisor)
    with beside([away, calm[1]]) as (router, _):
        assert_undisturbed(streams(router, WANTED[:1]), WANTED[:1])
        assert router.is_ready and not router.home_is_ready


# ---- affinity


@given(key=st.binary(max_size=40), num_instances=st.integers(1, 9), data=st.data())
def test_an_instance_that_goes_moves_its_own_conversations_only(
    key: bytes, num_instances: int, data: st.DataObject
) -> None:
    ranked = ranked_for(key, num_instances)
    assert sorted(ranked) == list(range(num_instances))
    added = ranked_for(key, num_instances + 1)
    assert [number for number in added if number != num_instances] == ranked


def test_conversations_spread_evenly() -> None:
    counts = Counter(ranked_for(number.to_bytes(4, "big"), 4)[0] for number in range(4000))
    assert set(counts) == set(range(4)) and min(counts.values()) > 850


def test_a_conversation_is_known_by_its_beginning() -> None:
    start = tuple(range(PREFIX_TOKENS))
    assert prefix_key(generation((*start, 5))) == prefix_key(generation((*start, 6, 7)))
    assert prefix_key(generation(start[:-1])) != prefix_key(generation(start))
    assert prefix_key(generation(start)) != prefix_key(generation(start, cache_salt="a")), "its blocks are its own"


@pytest.mark.parametrize("affinity", ["prefix", "correlation"])
def test_a_conversation_stays_with_its_core_whichever_instance_is_asked(
    calm: tuple[Instance, Instance], affinity: SessionAffinity
) -> None:
    """Every second turn went to the core that did not have the first one's blocks."""

    def ask(router: Router, turn: int) -> None:
        for number in range(12):
            prompt = (number,) * PREFIX_TOKENS if affinity == "prefix" else (turn,)
            sink = Collector()
            session = "" if affinity == "prefix" else f"user-{number}"
            router.submit(generation((*prompt, turn), max_tokens=2), sink, session)
            sink.wait()

    with (
        beside(calm, affinity=affinity) as (router, recorder),
        beside(calm, home=1, affinity=affinity) as (twin, others),
    ):
        ask(router, 1)
        ask(twin, 2)
        assert recorder.instances == others.instances and set(others.instances) == {0, 1}


def test_a_beginning_that_everybody_has_does_not_put_everybody_on_one_core(calm: tuple[Instance, Instance]) -> None:
    """A system prompt longer than what is looked at made one of the cores do all the work."""
    with beside(calm, affinity="prefix") as (router, recorder):
        sinks = [Collector() for _ in range(24)]
        for number, sink in enumerate(sinks):
            router.submit(generation((9,) * PREFIX_TOKENS + (number,), max_tokens=40), sink)
        for sink in sinks:
            sink.wait()
        assert min(Counter(recorder.instances).values()) >= 6


def test_what_is_kept_back_of_a_stream_is_told_before_it_moves() -> None:
    """Text that was joined with the next token's waited for the other core to compute the whole prompt."""
    wanted = generation((1, 2), max_tokens=60)
    told_to = Collector()
    sequence = OpenSequence(wanted, told_to, SharedStops.of(wanted), NumberText(), leader=0, index=0)
    outbox = Outbox(Pacing(1), lambda sequence: None)
    outbox.share_among(1)
    for index in (5, 6):
        sequence.fresh = [index]
        sequence.hold(sequence.take())
        outbox.add(sequence, time.monotonic_ns())
    assert told_to.ids() == (5,), "the second one is kept back"
    outbox.tell_held(sequence)
    assert told_to.ids() == (5, 6) and told_to.text() == "5,6," and outbox.patience_s is None
