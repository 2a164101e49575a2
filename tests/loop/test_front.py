"""A front and a core in a process of its own: what a client is promised while nothing dies."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator

import pytest
import zmq
from front_harness import (
    FAST,
    SLOW,
    Collector,
    NumberText,
    Recorder,
    eventually,
    generation,
    is_all_free,
    run,
)

from pageflight.core.errors import Cancelled, DeadlineExceeded, Draining, InvalidArgument, PromptTooLong
from pageflight.core.events import TokenEvent
from pageflight.loop.front import Front
from pageflight.loop.local import start_core
from pageflight.runners.fake import fake_log_prob

RECORDER = Recorder()


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    with start_core(SLOW, NumberText(), RECORDER) as started:
        yield started


def assert_core_is_idle() -> None:
    start = len(RECORDER.stats)
    eventually(
        lambda: any(map(is_all_free, RECORDER.stats[start:] or RECORDER.stats[-1:])), "the core frees all blocks"
    )


def test_streamed_deltas_are_the_answer_in_order(front: Front) -> None:
    streamed, whole = run(front, generation()), run(front, generation(stream=False))
    assert len(streamed.ids()) == 30 and len(streamed.events) > 1
    assert len(whole.events) == 1, "a client that does not stream gets one event"
    assert (streamed.ids(), streamed.text()) == (whole.ids(), whole.text())
    assert streamed.text() == "".join(f"{index}," for index in streamed.ids())


def test_the_final_event_tells_counts_and_times(front: Front) -> None:
    final = run(front, generation(max_tokens=7)).finals[0]
    usage = final.usage
    assert final.finish_reason == "length" and final.error is None and usage is not None
    assert (usage.num_input_tokens, usage.num_output_tokens) == (5, 7)
    assert 0 < usage.arrival_ns <= usage.first_scheduled_ns <= usage.first_token_ns <= usage.last_token_ns
    assert RECORDER.ends[-1] == ("length", 5, 7)


def test_every_sequence_of_n_gets_its_own_final_event(front: Front) -> None:
    sink = run(front, generation(n=4, temperature=1.0, seed=3))
    assert sorted(sink.finals) == [0, 1, 2, 3]
    assert len({sink.ids(index) for index in range(4)}) == 4


def test_a_stop_string_ends_the_sequence_and_frees_it_in_the_core(front: Front) -> None:
    """Stop strings that spanned two tokens leaked, and the core went on generating for nobody."""
    ids = run(front, generation()).ids()
    stop = f"{ids[9]},{ids[10]}"
    for stream in (True, False):
        sink = run(front, generation(max_tokens=900, stop=(stop,), stream=stream))
        final = sink.finals[0]
        assert final.finish_reason == "stop" and final.error is None
        assert sink.text() == "".join(f"{index}," for index in ids[:9])
        assert sink.ids()[:11] == ids[:11] and final.usage is not None
        assert final.usage.num_output_tokens == len(sink.ids()) == 11
    assert_core_is_idle()


def test_a_stop_string_within_min_tokens_does_not_count(front: Front) -> None:
    ids = run(front, generation()).ids()
    sink = run(front, generation(stop=(f"{ids[3]},",), min_tokens=10))
    assert len(sink.ids()) == 30 and sink.text().startswith("".join(f"{index}," for index in ids[:10]))


def test_what_only_began_a_stop_string_is_shown_at_the_end(front: Front) -> None:
    ids = run(front, generation()).ids()
    sink = run(front, generation(stop=(f"{ids[-1]},never",)))
    assert sink.text() == "".join(f"{index}," for index in ids)
    assert sink.finals[0].finish_reason == "length"


def test_a_stop_sequence_of_ids_is_not_shown_as_text(front: Front) -> None:
    ids = run(front, generation()).ids()
    sink = run(front, generation(stop_ids=((ids[5], ids[6]), (ids[29], 399))))
    assert sink.finals[0].finish_reason == "stop" and sink.ids() == ids[:7]
    assert sink.text() == "".join(f"{index}," for index in ids[:5])
    begun = run(front, generation(stop_ids=((ids[29], 399),)))
    assert begun.text() == "".join(f"{index}," for index in ids), "ids that only began a stop sequence are shown"


def test_the_end_token_counts_but_is_no_text(front: Front) -> None:
    ids = run(front, generation()).ids()
    end = next(i for i, index in enumerate(ids) if index not in ids[:i] and i > 3)
    for stops in ((), ("never found",)):
        sink = run(front, generation(stop_token_ids=(ids[end],), stop=stops))
        assert sink.finals[0].finish_reason == "stop" and sink.ids() == ids[: end + 1]
        assert sink.text() == "".join(f"{index}," for index in ids[:end])


def test_log_probs_belong_to_their_ids(front: Front) -> None:
    """Log probabilities of a neighbour that asked for them were taken for those of a sequence that did not."""
    silent, asking = Collector(), Collector()
    front.submit(generation((9, 9)), silent)
    front.submit(generation((8, 8), log_probs=True), asking)
    asking.wait(), silent.wait()
    assert all(not event.log_probs for event in silent.events)
    for event in asking.events:
        assert event.log_probs == tuple(fake_log_prob(index) for index in event.ids)
    usage = asking.finals[0].usage
    assert usage is not None and usage.cum_log_prob == sum(fake_log_prob(index) for index in asking.ids())


def test_cancel_ends_every_sequence_of_the_request_once(front: Front) -> None:
    sink = Collector(3)
    number = front.submit(generation(max_tokens=900, n=3), sink)
    sink.wait(lambda: sink.num_ids > 10)
    for _ in range(3):
        front.cancel(number)
    sink.wait()
    assert all(final.finish_reason == "cancelled" for final in sink.finals.values())
    assert all(isinstance(final.error, Cancelled) for final in sink.finals.values())
    front.cancel(number)
    assert_core_is_idle()


def test_the_deadline_ends_a_request_with_what_it_has(front: Front) -> None:
    final = run(front, generation(max_tokens=1000, timeout_ms=150)).finals[0]
    assert final.finish_reason == "deadline" and isinstance(final.error, DeadlineExceeded)


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        (generation(()), InvalidArgument),
        (generation((0,) * 1024), PromptTooLong),
        (generation(max_tokens=1020), PromptTooLong),
        (generation((400,)), InvalidArgument),
        (generation(n=10**9), InvalidArgument),
        (generation(stop=("",)), InvalidArgument),
        (generation(stop_ids=((),)), InvalidArgument),
    ],
)
def test_what_can_never_work_is_refused_at_once(front: Front, wanted: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        front.submit(wanted, Collector())  # type: ignore[arg-type]
    assert front.num_open == 0 and RECORDER.refusals[-1] == error.__name__


def test_a_receiver_that_raises_loses_only_its_own_request(front: Front, caplog: pytest.LogCaptureFixture) -> None:
    """An exception in a callback killed the response thread, and with it every stream."""
    events: list[TokenEvent] = []

    def broken(event: TokenEvent) -> None:
        events.append(event)
        raise RuntimeError("the client's buffer is gone")

    healthy = Collector()
    with caplog.at_level(logging.CRITICAL, logger="pageflight.loop.front"):
        front.submit(generation((7, 7), max_tokens=60), healthy)
        front.submit(generation(max_tokens=900), broken)
        eventually(lambda: bool(events) and events[-1].final, "the broken request ends")
        healthy.wait()
    assert len(healthy.ids()) == 60
    assert [event.final for event in events].count(True) == 1 and events[-1].finish_reason == "cancelled"


def test_garbage_on_the_sockets_harms_nobody(front: Front) -> None:
    """A frame that could not be decoded ended the loop."""
    sink = Collector()
    front.submit(generation(max_tokens=100), sink)
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger, context.socket(zmq.PUSH) as pusher:
        stranger.connect(front._address.events)
        pusher.connect(front._address.commands)
        for data in (b"", b"garbage", b"\x93\x02\x01", os.urandom(500)):
            stranger.send(data)
            pusher.send(data)
        assert len(sink.wait().ids()) == 100


def test_a_front_that_does_not_read_stalls_neither_core_nor_neighbours() -> None:
    """A blocking send to one front stopped the steps of all. The slow one gets everything later, in order, joined."""
    gate, recorder = threading.Event(), Recorder()
    with start_core(FAST, NumberText(), recorder) as slow:
        neighbour = Front(slow._address, NumberText(), Recorder())
        neighbour.wait_ready(10)
        blocked = Collector(4)

        def slow_sink(event: TokenEvent) -> None:
            gate.wait()
            blocked(event)

        wanted = generation(max_tokens=900, n=4)
        slow.submit(wanted, slow_sink)
        quick = run(neighbour, wanted)
        run(neighbour, wanted)
        assert not blocked.events
        gate.set()
        blocked.wait()
        assert {blocked.ids(index) for index in range(4)} == {quick.ids(0)}
        assert max(recorder.inter) > 1, "a front that is behind gets joined deltas"
        neighbour.close(0)


def test_two_fronts_with_equal_numbers_get_their_own_tokens() -> None:
    """Both count their requests from nought; the core keeps them apart."""
    with start_core(SLOW, NumberText()) as first:
        second = Front(first._address, NumberText(), Recorder())
        second.wait_ready(10)
        sinks = [Collector(), Collector()]
        assert first.submit(generation((1, 2)), sinks[0]) == second.submit(generation((3, 4)), sinks[1])
        for sink in sinks:
            sink.wait()
        assert sinks[0].ids() == run(second, generation((1, 2))).ids() != sinks[1].ids()
        second.close(0)


def test_close_finishes_open_requests_and_refuses_new_ones() -> None:
    with start_core(SLOW, NumberText()) as front:
        sink = Collector()
        front.submit(generation(max_tokens=100), sink)
        closer = threading.Thread(target=front.close, args=(15,))
        closer.start()
        eventually(lambda: not front.is_ready, "the front drains")
        with pytest.raises(Draining):
            front.submit(generation(), Collector())
        closer.join()
        assert len(sink.ids()) == 100 and sink.finals[0].finish_reason == "length"


def test_close_without_patience_still_gives_every_request_its_end() -> None:
    with start_core(SLOW, NumberText()) as front:
        sinks = [Collector() for _ in range(5)]
        for sink in sinks:
            front.submit(generation(max_tokens=900), sink)
        front.close(0)
        assert [sink.wait().finals[0].finish_reason for sink in sinks] == ["cancelled"] * 5


def test_a_server_that_is_about_to_end_takes_nothing_new_and_cuts_off_what_is_open() -> None:
    """Clients of a server that was shut down heard nothing, or that they had cancelled."""
    with start_core(SLOW, NumberText()) as owner:
        is_ending = threading.Event()
        front = Front(owner._address, NumberText(), recorder := Recorder(), is_ending=is_ending.is_set)
        front.wait_ready(60)
        sink = Collector(2)
        front.submit(generation(max_tokens=900, n=2), sink)
        sink.wait(lambda: sink.num_ids > 6)
        assert front.is_ready
        is_ending.set()
        assert not front.is_ready
        with pytest.raises(Draining, match="send it elsewhere"):
            front.submit(generation(), Collector())
        assert recorder.refusals == ["Draining"]
        front.cut_off()
        finals = sink.wait().finals.values()
        assert [type(final.error) for final in finals] == [Draining, Draining]
        assert all("ended before this request" in str(final.error) for final in finals)
        front.close(0)
