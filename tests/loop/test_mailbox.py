"""The core's mailbox with real sockets, in one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from front_harness import eventually

from pageflight.core.errors import QueueFull
from pageflight.core.plan import Finished, StepEvents
from pageflight.core.request import Request, SamplingParams
from pageflight.core.stats import CoreStats
from pageflight.loop import engine_loop, frames
from pageflight.loop.address import private_address
from pageflight.loop.client import CoreClient, Disconnected
from pageflight.loop.frames import CoreLimits, Hello, Rejected, StatsFrame, StepFrame, int32_of, int64_of
from pageflight.loop.mailbox import ZmqMailbox

LIMITS = CoreLimits(max_model_len=64, num_blocks=8, block_size=8, vocab_size=9, max_num_seqs=4, max_queue_size=5)


class Line:
    """A mailbox and the fronts that connect to it."""

    def __init__(self) -> None:
        self.address = private_address()
        self.address.create()
        self.beats = 0
        self.mailbox = ZmqMailbox(self.address, LIMITS, beat=self._beat)
        self.clients: list[CoreClient] = []
        self.commands: list[engine_loop.Command] = []

    def _beat(self) -> None:
        self.beats += 1

    def connect(self) -> tuple[CoreClient, Hello]:
        client = CoreClient(self.address)
        self.clients.append(client)
        found: list[object] = []

        def met() -> bool:
            found.extend(client.receive(0.01))
            self.turn()
            return any(isinstance(message, Hello) for message in found)

        eventually(met, "the core says hello")
        return client, next(message for message in found if isinstance(message, Hello))

    def turn(self, timeout_s: float = 0.01) -> None:
        self.commands += self.mailbox.receive(timeout_s)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        def turn() -> bool:
            self.turn()
            return condition()

        eventually(turn, what)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.mailbox.close(0.1)
        self.address.remove()


@pytest.fixture
def line() -> Iterator[Line]:
    line = Line()
    yield line
    line.close()


def submit(line: Line, client: CoreClient, hello: Hello, handle: int, *, n: int = 1) -> int:
    """Submit and return the handle that the core gave it."""
    request = Request(handle=handle, prompt_ids=(1, 2), sampling=SamplingParams(n=n))
    client.send(frames.Submit(hello.epoch, client.identity, request))
    before = len(line.commands)
    line.until(lambda: len(line.commands) > before, "the request arrives")
    command = line.commands[-1]
    assert isinstance(command, engine_loop.Submit)
    return command.request.handle


def news(handles: list[int], ids: list[int], finished: tuple[Finished, ...] = ()) -> StepEvents:
    return StepEvents(1, np.array(handles, np.int64), np.array(ids, np.int32), None, finished)


def ending(handle: int) -> Finished:
    return Finished(handle=handle, reason="stop", num_prompt_tokens=2, num_output_tokens=1)


def received(client: CoreClient, kind: type[object], count: int = 1) -> list[object]:
    found: list[object] = []

    def enough() -> bool:
        found.extend(message for message in client.receive(0.01) if isinstance(message, kind))
        return len(found) >= count

    eventually(enough, f"{count} × {kind.__name__}")
    return found


def test_each_front_gets_its_own_news_in_its_own_numbers(line: Line) -> None:
    """Two stubs both start counting at nought."""
    (one, hello_one), (two, hello_two) = line.connect(), line.connect()
    first, second = submit(line, one, hello_one, 5), submit(line, two, hello_two, 5)
    assert first != second
    line.mailbox.publish(news([first, second, first], [1, 2, 3], (ending(second),)))
    (to_one,), (to_two,) = received(one, StepFrame), received(two, StepFrame)
    assert isinstance(to_one, StepFrame) and isinstance(to_two, StepFrame)
    assert (int64_of(to_one.handles).tolist(), int32_of(to_one.ids).tolist(), to_one.finished) == ([5, 5], [1, 3], [])
    assert (int64_of(to_two.handles).tolist(), int32_of(to_two.ids).tolist()) == ([5], [2])
    assert to_two.finished == [ending(5)]


def test_news_for_a_front_that_does_not_read_are_joined_and_none_is_lost(line: Line) -> None:
    """A full socket drops messages in silence unless told otherwise."""
    client, hello = line.connect()
    handle = submit(line, client, hello, 0)
    record = next(iter(line.mailbox._fronts.values()))
    width = 20_000  # bytes enough to fill the kernel's buffer as well
    count = 0
    while len(record.backlog) < 10:
        line.mailbox.publish(news([handle] * width, [count] * width))
        count += 1
        assert count < 2000, "the socket never filled up"
    line.mailbox.reject(handle, QueueFull(3, 5))
    line.mailbox.publish(news([handle], [count], (ending(handle),)))
    found: list[object] = []

    def read() -> bool:
        found.extend(client.receive(0.01))
        line.turn(0.0)
        return any(isinstance(message, StepFrame) and message.finished for message in found)

    eventually(read, "the ending arrives")
    steps = [message for message in found if isinstance(message, StepFrame)]
    ids = np.concatenate([int32_of(message.ids) for message in steps])
    assert ids.tolist() == [number for number in range(count) for _ in range(width)] + [count]
    assert len(steps) < count, "what waited was joined"
    assert any(isinstance(message, Rejected) and message.error == "QueueFull" for message in found)


def test_a_front_that_leaves_has_everything_cancelled(line: Line) -> None:
    client, hello = line.connect()
    group, single = submit(line, client, hello, 0, n=3), submit(line, client, hello, 3)
    line.mailbox.publish(news([group], [1], (ending(group + 1),)))
    line.commands.clear()
    client.send(frames.Leave(hello.epoch, client.identity))
    line.until(lambda: bool(line.commands), "the cancels arrive")
    assert line.commands == [engine_loop.Cancel(handle) for handle in (group, group + 2, single)]


def test_the_last_front_gets_no_news_of_those_that_have_left(line: Line) -> None:
    """With one front left all went to it: tokens and endings of another client's sequence, in its own numbers."""
    (leaving, hello), (staying, _) = line.connect(), line.connect()
    stranger = submit(line, leaving, hello, 1)
    own = submit(line, staying, hello, 1)
    leaving.send(frames.Leave(hello.epoch, leaving.identity))
    line.until(lambda: engine_loop.Cancel(stranger) in line.commands, "the sequence is cancelled")
    line.mailbox.publish(news([stranger, own], [7, 8], (ending(stranger),)))
    line.mailbox.publish(news([stranger], [7]))
    line.mailbox.publish(news([own], [9], (ending(own),)))
    (first, second) = received(staying, StepFrame, 2)
    assert isinstance(first, StepFrame) and isinstance(second, StepFrame)
    assert [int32_of(frame.ids).tolist() for frame in (first, second)] == [[8], [9]]
    assert [len(frame.finished) for frame in (first, second)] == [0, 1]


def test_a_refused_request_is_not_cancelled_later(line: Line) -> None:
    """Refused handles stayed on the front's list for ever."""
    client, hello = line.connect()
    handle = submit(line, client, hello, 0, n=3)
    line.mailbox.reject(handle, QueueFull(7, 7))
    (message,) = received(client, Rejected)
    assert message == Rejected(hello.epoch, 0, "QueueFull", str(QueueFull(7, 7)))
    line.commands.clear()
    client.send(frames.Leave(hello.epoch, client.identity))
    line.until(lambda: not line.mailbox._fronts, "the front leaves")
    assert not line.commands


def test_commands_meant_for_another_core_are_dropped(line: Line) -> None:
    """What a front sent to the core that died was flushed into the next one, and ran twice."""
    client, hello = line.connect()
    request = Request(handle=0, prompt_ids=(1,), sampling=SamplingParams())
    client.send(frames.Submit(hello.epoch + 1, client.identity, request))
    client.send(frames.Submit(hello.epoch, b"nobody", request))
    client.send(frames.Cancel(hello.epoch, client.identity, (4,)))
    line.until(lambda: bool(line.commands), "the cancel arrives")
    assert [type(command) for command in line.commands] == [engine_loop.Cancel]


def test_a_front_that_connects_again_starts_afresh(line: Line) -> None:
    """Its sequences of the broken connection would answer to numbers that it uses again."""
    client, hello = line.connect()
    handle = submit(line, client, hello, 0)
    line.commands.clear()
    client._events.send(frames.encode(frames.Connect(frames.PROTOCOL, client.identity, os.getpid())))
    line.until(lambda: bool(line.commands), "the old sequence is cancelled")
    assert line.commands == [engine_loop.Cancel(handle)]
    assert submit(line, client, hello, 0) != handle


def test_statistics_reach_every_front_and_the_loop_shows_life(line: Line) -> None:
    clients = [line.connect()[0] for _ in range(2)]
    line.mailbox.publish_stats(CoreStats(num_running=3, refusals={"QueueFull": 2}))
    for client in clients:
        (message,) = received(client, StatsFrame)
        assert isinstance(message, StatsFrame) and message.stats.refusals == {"QueueFull": 2}
    before = line.beats
    line.until(lambda: line.beats > before + 1, "the mailbox beats while it waits")


def test_a_stop_from_a_signal_handler_wakes_the_waiting_loop(line: Line) -> None:
    line.mailbox.stop(engine_loop.Drain())
    assert line.mailbox.receive(None) == [engine_loop.Drain()]


def test_a_core_that_ends_late_does_not_cut_off_its_successor(line: Line) -> None:
    """A model that is loaded again starts its core before the old one has ended, and zmq removed its files."""
    successor = ZmqMailbox(line.address, LIMITS, beat=lambda: None)
    line.mailbox.close(0.0)
    line.mailbox = successor
    line.connect()


def test_a_core_that_goes_is_noticed_by_its_fronts(line: Line) -> None:
    client, _ = line.connect()
    line.mailbox._context.destroy(linger=0)
    received(client, Disconnected)
    line.mailbox = ZmqMailbox(line.address, LIMITS, beat=lambda: None)
    found: list[object] = []

    def met() -> bool:
        line.turn()
        found.extend(client.receive(0.01))
        return any(isinstance(message, Hello) for message in found)

    eventually(met, "the client finds the next core by itself")
