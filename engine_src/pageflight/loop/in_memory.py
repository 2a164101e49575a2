"""A mailbox without processes or sockets: for tests, tools and a core in the caller's own process."""

from __future__ import annotations

import threading
from collections.abc import Sequence as Many

from pageflight.core.errors import PageflightError
from pageflight.core.plan import StepEvents
from pageflight.loop.engine_loop import Command


class InMemoryMailbox:
    """Commands are put from any thread; events are kept until taken."""

    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._commands: list[Command] = []
        self._events: list[StepEvents] = []
        self._rejections: list[tuple[int, PageflightError]] = []

    def send(self, *commands: Command) -> None:
        """Hand commands to the loop, in this order."""
        with self._arrived:
            self._commands.extend(commands)
            self._arrived.notify_all()

    def take_events(self) -> list[StepEvents]:
        """What was published since the last call."""
        with self._arrived:
            events, self._events = self._events, []
        return events

    def take_rejections(self) -> list[tuple[int, PageflightError]]:
        """Refused requests since the last call: handle and reason."""
        with self._arrived:
            rejections, self._rejections = self._rejections, []
        return rejections

    @property
    def has_commands(self) -> bool:
        """Whether the loop would find something now."""
        with self._arrived:
            return bool(self._commands)

    def receive(self, timeout_s: float | None) -> Many[Command]:
        with self._arrived:
            if not self._commands and timeout_s != 0:
                self._arrived.wait_for(lambda: bool(self._commands), timeout_s)
            commands, self._commands = self._commands, []
        return commands

    def publish(self, events: StepEvents) -> None:
        with self._arrived:
            self._events.append(events)

    def reject(self, handle: int, error: PageflightError) -> None:
        with self._arrived:
            self._rejections.append((handle, error))
