"""What streams will be told next, and when: now, with the tokens after it, or once it has waited too long."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from pageflight.loop.open_sequence import OpenSequence
from pageflight.loop.pacing import HOLD_LIMIT_S, Pacing

log = logging.getLogger(__name__)


class Outbox:
    """Streams with news that nobody has been told yet. Of the response thread.

    `give_up` is told of a stream whose receiver raised.
    """

    def __init__(self, pacing: Pacing, give_up: Callable[[OpenSequence], None]) -> None:
        self._pacing, self._give_up = pacing, give_up
        self._held: dict[OpenSequence, None] = {}
        self._interval_ns = 0

    @property
    def patience_s(self) -> float | None:
        """How soon `tell_overdue` should be called again; None while there is no news."""
        return HOLD_LIMIT_S / 2 if self._held else None

    def share_among(self, num_streams: int) -> None:
        """So many streams have news at once."""
        self._interval_ns = self._pacing.interval_ns(num_streams)

    def add(self, sequence: OpenSequence, now_ns: int) -> None:
        """News of a stream: told at once if the last time is long enough ago, as it is with a first token."""
        self._held[sequence] = None
        if now_ns - sequence.told_ns >= self._interval_ns:
            self._tell(sequence, now_ns)

    def forget(self, sequence: OpenSequence) -> None:
        """Its news goes out with its final event."""
        self._held.pop(sequence, None)

    def tell_held(self, sequence: OpenSequence) -> None:
        """What is kept back of a stream goes out now."""
        if sequence in self._held:
            self._tell(sequence, time.monotonic_ns())

    def tell_overdue(self) -> None:
        """Text whose stream stands still, for whatever reason, does not wait for its next token."""
        if not self._held:
            return
        now_ns = time.monotonic_ns()
        for sequence in [s for s in self._held if now_ns - s.told_ns > HOLD_LIMIT_S * 1e9]:
            self._tell(sequence, now_ns)

    def _tell(self, sequence: OpenSequence, now_ns: int) -> None:
        del self._held[sequence]
        sequence.told_ns = now_ns
        try:
            sequence.sink(sequence.event())
        except Exception:
            log.exception("the receiver of request %r failed; it is cancelled", sequence.generation.request_id)
            self._give_up(sequence)
