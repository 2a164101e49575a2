"""A front's line to its cores without sockets: nothing moves unless the test moves it, and a core can die anywhere."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from pageflight.core.errors import PageflightError
from pageflight.core.plan import StepEvents
from pageflight.loop import engine_loop, frames
from pageflight.loop.client import Disconnected
from pageflight.loop.frames import FromCore, FromFront, decode_from_core, decode_from_front, encode

WAIT_S = 60.0


class Line:
    """In place of a CoreClient. Frames and commands go through their real encoding."""

    identity = b"front"

    def __init__(self) -> None:
        self.commands: deque[FromFront] = deque()
        self.confirmed: set[int] = set()
        """Handles of which the front was told that a core had accepted them."""
        self._changed = threading.Condition()
        self._inbox: list[FromCore | Disconnected] = []
        self._is_woken = self._is_waiting = self._is_closed = False

    # ---- what a front calls

    def send(self, command: FromFront) -> None:
        with self._changed:
            self.commands.append(decode_from_front(encode(command)))

    def wake(self) -> None:
        with self._changed:
            self._is_woken = True
            self._changed.notify_all()

    def receive(self, timeout_s: float) -> list[FromCore | Disconnected]:
        """Whatever the test has delivered; time does not pass here."""
        with self._changed:
            self._is_waiting = True
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._inbox or self._is_woken, WAIT_S), "the test has gone away"
            self._is_waiting = self._is_woken = False
            messages, self._inbox = self._inbox, []
        return messages

    def close(self) -> None:
        self._is_closed = True

    # ---- what a test calls

    def deliver(self, *messages: FromCore | Disconnected) -> None:
        """Hand these to the front and wait until it has done what they ask for."""
        with self._changed:
            self._inbox += messages
            self._changed.notify_all()
        self.settle()

    def settle(self) -> None:
        """Wait until the front has nothing to do."""
        with self._changed:
            done = self._changed.wait_for(
                lambda: (self._is_waiting and not self._inbox and not self._is_woken) or self._is_closed, WAIT_S
            )
            assert done, "the front does not come back"


@dataclass(eq=False)
class LineMailbox:
    """The core's end of a Line, for one life of a core. `wire` is what it said and nobody has heard yet."""

    line: Line
    epoch: int

    def __post_init__(self) -> None:
        self.wire: deque[FromCore] = deque()
        self._taken: list[range] = []  # handles of each request in order
        self._refused: set[int] = set()

    @property
    def has_commands(self) -> bool:
        return bool(self.line.commands)

    def receive(self, timeout_s: float | None) -> list[engine_loop.Command]:
        if self.line.commands:
            self._say(frames.Beat(self.epoch, len(self._taken)))  # now and then, in truth
        commands: list[engine_loop.Command] = []
        while self.line.commands:
            message = self.line.commands.popleft()
            if isinstance(message, frames.Connect) or message.epoch != self.epoch:
                continue  # meant for a core that is no more
            if isinstance(message, frames.Submit):
                first = message.request.handle
                self._taken.append(range(first, first + message.request.sampling.n))
                commands.append(engine_loop.Submit(message.request))
            elif isinstance(message, frames.Cancel):
                commands += [engine_loop.Cancel(handle, message.by_client) for handle in message.handles]
        return commands

    def publish(self, events: StepEvents) -> None:
        log_probs = None if events.log_probs is None else events.log_probs.tobytes()
        handles, ids = events.handles.tobytes(), events.ids.tobytes()
        self._say(frames.StepFrame(self.epoch, events.step, handles, ids, log_probs, list(events.finished)))

    def reject(self, handle: int, error: PageflightError) -> None:
        self._refused.add(handle)
        self._say(frames.Rejected(self.epoch, handle, *frames.error_to_wire(error)))

    def deliver(self, count: int) -> None:
        """The next `count` frames reach the front, each by itself or with the next: it must not matter."""
        messages = [self.wire.popleft() for _ in range(min(count, len(self.wire)))]
        for message in messages:
            if isinstance(message, frames.Beat):
                accepted = [handles for handles in self._taken[: message.num_taken] if handles[0] not in self._refused]
                self.line.confirmed.update(handle for handles in accepted for handle in handles)
        self.line.deliver(*messages)

    def _say(self, frame: FromCore) -> None:
        self.wire.append(decode_from_core(encode(frame)))
