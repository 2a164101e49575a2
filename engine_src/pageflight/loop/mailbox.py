"""The core's end of the line: commands of several fronts in, one frame per step and front out.

Handles of different fronts do not collide: a front's own numbers fill the low bits, the core adds the front's number
above them. No call waits for a front. One that does not read fast enough finds its news joined into one frame later;
one whose process has died, or that took its leave, has all its sequences cancelled.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import zmq
from numpy.typing import NDArray

from pageflight.core.errors import PageflightError
from pageflight.core.plan import Finished, StepEvents
from pageflight.core.stats import CoreStats
from pageflight.loop import engine_loop, frames
from pageflight.loop.address import CoreAddress
from pageflight.loop.binding import bind_over
from pageflight.loop.client import MAX_QUEUED_FRAMES
from pageflight.loop.frames import BadFrame, CoreLimits, StepFrame, encode, error_to_wire

log = logging.getLogger(__name__)

_HANDLE_BITS = 44
_HANDLE_MASK = (1 << _HANDLE_BITS) - 1
_CARE_INTERVAL_S = 0.25
"""How often fronts are looked after while steps run."""
_MAX_COMMANDS = 4096
"""Commands taken in one turn: a flood of requests must not keep the steps waiting."""
_RETRY_S = 0.005
"""How soon an idle core tries again to send to a front that is behind."""


@dataclass(slots=True, eq=False)
class _FrontRecord:
    """A connected front and its sequences."""

    identity: bytes
    number: int
    pid: int
    pidfd: int  # -1 where the kernel offers none
    num_taken: int = 0
    """Requests that `receive` has returned."""
    num_sequences: dict[int, int] = field(default_factory=dict)
    """By open handle in its own numbers: how many sequences its request has from there on."""
    refused: list[bytes] = field(default_factory=list)  # frames that its full socket did not take, in order
    backlog: list[StepEvents] = field(default_factory=list)  # news after them

    @property
    def is_behind(self) -> bool:
        return bool(self.refused or self.backlog)


class ZmqMailbox:
    """`engine_loop.Mailbox` over zmq. One thread owns it, the loop's; `stop` alone may be called from a signal handler.

    `beat` is called a few times a second as long as the loop turns or waits for commands.
    """

    def __init__(self, address: CoreAddress, limits: CoreLimits, *, beat: Callable[[], None]) -> None:
        self._limits, self._beat = limits, beat
        self.epoch = int.from_bytes(os.urandom(7), "little") or 1
        """Names this core among those before and after it; never 0."""
        self._fronts: dict[bytes, _FrontRecord] = {}
        self._by_number: dict[int, _FrontRecord] = {}
        self._next_number = 1
        self._next_care_s = 0.0
        self._stop_command: engine_loop.Command | None = None
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._context = zmq.Context()
        self._commands = self._context.socket(zmq.PULL)
        self._commands.setsockopt(zmq.RCVHWM, 0)
        self._events = self._context.socket(zmq.ROUTER)
        self._events.setsockopt(
            zmq.ROUTER_MANDATORY, 1
        )  # a front that is gone or behind is an error, not a silent drop
        self._events.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._events.setsockopt(zmq.SNDHWM, MAX_QUEUED_FRAMES)
        self._poller = zmq.Poller()
        for source in (self._commands, self._events, self._wake_fd):
            self._poller.register(source, zmq.POLLIN)
        bind_over(self._commands, address.commands)
        bind_over(self._events, address.events)

    # ---- engine_loop.Mailbox

    def receive(self, timeout_s: float | None) -> list[engine_loop.Command]:
        """Commands since the last call; while it waits, it looks after fronts and gives the sign of life."""
        commands: list[engine_loop.Command] = []
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            now_s = time.monotonic()
            if now_s >= self._next_care_s:  # first: commands that are read now have not been obeyed yet
                self._next_care_s = now_s + _CARE_INTERVAL_S
                self._care(commands)
            self._drain(commands)
            is_behind = self._catch_up()
            if commands or (until_s is not None and now_s >= until_s):
                return commands
            wait_s = _RETRY_S if is_behind else _CARE_INTERVAL_S
            self._poller.poll(int(1000 * (wait_s if until_s is None else min(until_s - now_s, wait_s))) + 1)

    def publish(self, events: StepEvents) -> None:
        owners = events.handles >> _HANDLE_BITS
        if len(self._by_number) == 1:
            (only,) = self._by_number.values()
            if _is_all_of(only.number, owners, events.finished):
                self._post(only, _in_own_numbers(events))
                return
        ended_of: dict[int, list[Finished]] = {}
        for finished in events.finished:
            ended_of.setdefault(finished.handle >> _HANDLE_BITS, []).append(finished)
        for number in {*np.unique(owners).tolist(), *ended_of}:
            front = self._by_number.get(number)
            if front is not None:
                self._post(front, _in_own_numbers(_select(events, owners == number, ended_of.get(number, []))))

    def reject(self, handle: int, error: PageflightError) -> None:
        front = self._by_number.get(handle >> _HANDLE_BITS)
        if front is None:
            return
        own = handle & _HANDLE_MASK
        for number in range(own, own + front.num_sequences.get(own, 1)):
            front.num_sequences.pop(number, None)
        name, message = error_to_wire(error)
        frame = encode(frames.Rejected(self.epoch, own, name, message))
        if front.is_behind or not self._send(front, frame):
            front.refused.append(frame)

    # ---- for the core process

    def publish_stats(self, stats: CoreStats) -> None:
        """To every front that is not behind: the next ones come soon."""
        frame = encode(frames.StatsFrame(self.epoch, stats))
        for front in self._fronts.values():
            if not front.is_behind:
                self._send(front, frame)

    def stop(self, command: engine_loop.Command) -> None:
        """Hand the loop a Drain or Shutdown. Safe in a signal handler."""
        self._stop_command = command
        os.eventfd_write(self._wake_fd, 1)

    def close(self, linger_s: float = 2.0) -> None:
        """Send what is left, then disconnect."""
        until_s = time.monotonic() + linger_s
        while self._catch_up() and time.monotonic() < until_s:
            time.sleep(_RETRY_S)
        for front in list(self._fronts.values()):
            self._forget(front)
        self._context.destroy(linger=int(linger_s * 1000))
        os.close(self._wake_fd)

    # ---- fronts → core

    def _drain(self, commands: list[engine_loop.Command]) -> None:
        if self._stop_command is not None:
            commands.append(self._stop_command)
            self._stop_command = None
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
        with contextlib.suppress(zmq.Again):
            while _has_input(self._events):
                self._meet(self._events.recv_multipart(zmq.NOBLOCK), commands)
        with contextlib.suppress(zmq.Again):
            while len(commands) < _MAX_COMMANDS and _has_input(self._commands):
                self._obey(self._commands.recv(zmq.NOBLOCK), commands)

    def _meet(self, parts: list[bytes], commands: list[engine_loop.Command]) -> None:
        try:
            message = frames.decode_from_front(parts[-1])
            if not isinstance(message, frames.Connect) or message.front != parts[0]:
                raise BadFrame("a front must introduce itself first")
        except BadFrame as error:
            log.warning("dropped a frame: %s", error)
            return
        known = self._fronts.get(message.front)
        if known is not None:  # its connection broke: it will submit again what it still wants
            self._drop(known, commands)
        base = 0
        if message.protocol == frames.PROTOCOL:
            front = _FrontRecord(message.front, self._next_number, message.pid, _open_pidfd(message.pid))
            self._next_number += 1
            self._fronts[front.identity] = self._by_number[front.number] = front
            base = front.number << _HANDLE_BITS
            if front.pidfd >= 0:
                self._poller.register(front.pidfd, zmq.POLLIN)
        hello = frames.Hello(frames.PROTOCOL, self.epoch, os.getpid(), self._limits, base)
        with contextlib.suppress(zmq.ZMQError):  # gone again, or it floods us with introductions: no matter
            self._events.send_multipart((message.front, encode(hello)), zmq.NOBLOCK)

    def _obey(self, data: bytes, commands: list[engine_loop.Command]) -> None:
        try:
            message = frames.decode_from_front(data)
        except BadFrame as error:
            log.warning("dropped a command: %s", error)
            return
        front = self._fronts.get(message.front)
        if isinstance(message, frames.Connect) or front is None or message.epoch != self.epoch:
            return  # meant for a core that is no more, or from a front that has left: it will introduce itself
        if isinstance(message, frames.Submit):
            own, count = message.request.handle, message.request.sampling.n
            front.num_taken += 1
            front.num_sequences.update((own + index, count - index) for index in range(count))
            request = replace(message.request, handle=front.number << _HANDLE_BITS | own)
            commands.append(engine_loop.Submit(request))
        elif isinstance(message, frames.Cancel):
            base = front.number << _HANDLE_BITS
            commands += [engine_loop.Cancel(base | own, message.by_client) for own in message.handles]
        else:
            self._drop(front, commands)

    # ---- core → fronts

    def _post(self, front: _FrontRecord, events: StepEvents) -> None:
        for finished in events.finished:
            front.num_sequences.pop(finished.handle, None)
        if front.is_behind:
            front.backlog.append(events)  # `receive` tries again, once a turn
            return
        frame = self._encoded(events)
        if not self._send(front, frame):
            front.refused.append(frame)

    def _catch_up(self) -> bool:
        """Try to send what waits; whether some front is still behind. What came meanwhile goes as one frame."""
        is_behind = False
        for front in self._fronts.values():
            while front.is_behind:
                if not front.refused:
                    front.refused.append(self._encoded(_joined(front.backlog)))
                    front.backlog = []
                if not self._send(front, front.refused[0]):
                    is_behind = True
                    break
                del front.refused[0]
        return is_behind

    def _encoded(self, events: StepEvents) -> bytes:
        log_probs = None if events.log_probs is None else events.log_probs.astype(np.float32, copy=False).tobytes()
        ids = events.ids.astype(np.int32, copy=False)
        return encode(
            StepFrame(
                self.epoch, events.step, events.handles.tobytes(), ids.tobytes(), log_probs, list(events.finished)
            )
        )

    def _send(self, front: _FrontRecord, frame: bytes) -> bool:
        """False when the front is behind. A front that is gone counts as served: `_care` will find it."""
        try:
            self._events.send_multipart((front.identity, frame), zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._next_care_s = 0.0
            front.pid = 0
        return True

    # ---- fronts that go

    def _care(self, commands: list[engine_loop.Command]) -> None:
        self._beat()
        for front in list(self._fronts.values()):
            if front.pid == 0 or not _is_alive(front):
                log.warning("a front is gone: %d sequences are cancelled", len(front.num_sequences))
                self._drop(front, commands)
            elif not front.is_behind:
                self._send(front, encode(frames.Beat(self.epoch, front.num_taken)))

    def _drop(self, front: _FrontRecord, commands: list[engine_loop.Command]) -> None:
        commands += [engine_loop.Cancel(front.number << _HANDLE_BITS | own) for own in front.num_sequences]
        self._forget(front)

    def _forget(self, front: _FrontRecord) -> None:
        del self._fronts[front.identity], self._by_number[front.number]
        if front.pidfd >= 0:
            self._poller.unregister(front.pidfd)
            os.close(front.pidfd)


def _has_input(socket: zmq.Socket[bytes]) -> bool:
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)


def _open_pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError:  # no such call in an old kernel or a sandbox, or the process has gone already
        return -1


def _is_alive(front: _FrontRecord) -> bool:
    if front.pidfd < 0:
        return os.path.exists(f"/proc/{front.pid}")
    poller = zmq.Poller()
    poller.register(front.pidfd, zmq.POLLIN)
    return not poller.poll(0)


def _is_all_of(number: int, owners: NDArray[np.int64], finished: Sequence[Finished]) -> bool:
    """Whether nothing comes of sequences whose front has gone: their own numbers may be those of others as well."""
    return bool((owners == number).all()) and all(item.handle >> _HANDLE_BITS == number for item in finished)


def _in_own_numbers(events: StepEvents) -> StepEvents:
    finished = tuple(replace(item, handle=item.handle & _HANDLE_MASK) for item in events.finished)
    return StepEvents(events.step, events.handles & _HANDLE_MASK, events.ids, events.log_probs, finished)


def _select(events: StepEvents, chosen: NDArray[np.bool_], finished: list[Finished]) -> StepEvents:
    log_probs = None if events.log_probs is None else events.log_probs[chosen]
    return StepEvents(events.step, events.handles[chosen], events.ids[chosen], log_probs, tuple(finished))


def _joined(parts: list[StepEvents]) -> StepEvents:
    """Several steps' news as one: ids in order, endings after them."""
    log_probs = None
    if any(part.log_probs is not None for part in parts):
        log_probs = np.concatenate(
            [np.zeros(len(part.ids), np.float32) if part.log_probs is None else part.log_probs for part in parts]
        )
    return StepEvents(
        parts[-1].step,
        np.concatenate([part.handles for part in parts]),
        np.concatenate([part.ids for part in parts]),
        log_probs,
        tuple(finished for part in parts for finished in part.finished),
    )
