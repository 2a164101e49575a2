"""A front's connection to its core: commands from any thread, frames for one thread that blocks for them.

Two sockets: commands are pushed through one (under a lock), frames arrive on the other, owned by the receiving thread
together with its monitor. A core that dies closes both at once, which the monitor tells; zmq connects again by itself
as soon as another core has taken the place.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import parse_monitor_message

from pageflight.loop.address import CoreAddress
from pageflight.loop.frames import PROTOCOL, BadFrame, Connect, FromCore, FromFront, decode_from_core, encode

log = logging.getLogger(__name__)

_RECONNECT_MS = 20
_MAX_RECONNECT_MS = 200
MAX_QUEUED_FRAMES = 64
"""Frames that may wait in the socket; beyond, the core joins what follows and nothing is lost."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The core has closed its end, or died."""


class CoreClient:
    """One front's line to one core."""

    def __init__(self, address: CoreAddress) -> None:
        self._context = zmq.Context()
        self.identity = os.urandom(8)
        self._send_lock = threading.Lock()
        self._closed = False
        self._commands = self._context.socket(zmq.PUSH)
        self._events = self._context.socket(zmq.DEALER)
        for socket in (self._commands, self._events):
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, _MAX_RECONNECT_MS)
            socket.setsockopt(zmq.SNDHWM, 0)  # commands are few and must never block the sender
        self._events.setsockopt(zmq.RCVHWM, MAX_QUEUED_FRAMES)
        self._events.setsockopt(zmq.IDENTITY, self.identity)
        self._monitor = self._events.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        for source in (self._events, self._monitor, self._wake_fd):
            self._poller.register(source, zmq.POLLIN)
        self._commands.connect(address.commands)
        self._events.connect(address.events)

    def send(self, command: FromFront) -> None:
        """Queue a command for the core. Any thread; never blocks. After `close` it does nothing."""
        data = encode(command)
        with self._send_lock:
            if not self._closed:
                self._commands.send(data)

    def wake(self) -> None:
        """Make `receive` return. Any thread."""
        with self._send_lock:
            if not self._closed:
                os.eventfd_write(self._wake_fd, 1)

    def receive(self, timeout_s: float) -> list[FromCore | Disconnected]:
        """Everything that has arrived, waiting up to `timeout_s` for the first. One thread only."""
        ready = dict(self._poller.poll(int(timeout_s * 1000)))
        messages: list[FromCore | Disconnected] = []
        if self._events in ready:
            self._drain(messages)
        if self._monitor in ready:
            self._follow_monitor(messages)
        if self._wake_fd in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
        return messages

    def close(self) -> None:
        """By the receiving thread, or after it has ended."""
        with self._send_lock:
            self._closed = True
            self._events.disable_monitor()
            self._context.destroy(linger=200)
            os.close(self._wake_fd)

    def _drain(self, messages: list[FromCore | Disconnected]) -> None:
        with contextlib.suppress(zmq.Again):
            for _ in range(2 * MAX_QUEUED_FRAMES):
                data = self._events.recv(zmq.NOBLOCK)
                try:
                    messages.append(decode_from_core(data))
                except BadFrame as error:
                    log.error("dropped a frame from the engine core: %s", error)

    def _follow_monitor(self, messages: list[FromCore | Disconnected]) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"]
                if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self._events.send(encode(Connect(PROTOCOL, self.identity, os.getpid())))
                elif event == zmq.EVENT_DISCONNECTED:
                    self._drain(messages)  # the dead core's last words come first
                    messages.append(Disconnected())
