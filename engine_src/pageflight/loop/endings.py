"""The final event of each sequence: once, after everything else that its stream is told."""

from __future__ import annotations

import logging
import threading

from pageflight.core.errors import PageflightError
from pageflight.core.events import TokenEvent
from pageflight.core.plan import Finished
from pageflight.loop.book import Book
from pageflight.loop.observer import Observer
from pageflight.loop.observing import observe_end
from pageflight.loop.open_sequence import OpenSequence
from pageflight.loop.outbox import Outbox

log = logging.getLogger(__name__)


class Endings:
    """Of one front's sequences. Used by its response thread, without the lock of `idle`, who is notified when nothing
    is open any more."""

    def __init__(self, book: Book, outbox: Outbox, observer: Observer, idle: threading.Condition) -> None:
        self._book, self._outbox, self._observer, self._idle = book, outbox, observer, idle

    def finish(
        self,
        sequence: OpenSequence,
        text: str,
        reason: str,
        finished: Finished | None,
        error: PageflightError | None = None,
    ) -> None:
        """Deliver the final event, if it has not been yet."""
        event = self._deliver(sequence, text, reason, finished, error)
        if event is not None:
            observe_end(self._observer, sequence, event, finished)

    def refuse(self, sequence: OpenSequence, error: PageflightError) -> None:
        """The same with an error, and nothing that the histograms of finished requests should count."""
        self._deliver(sequence, "", "error", None, error)

    def _deliver(
        self,
        sequence: OpenSequence,
        text: str,
        reason: str,
        finished: Finished | None,
        error: PageflightError | None,
    ) -> TokenEvent | None:
        with self._idle:
            if not self._book.remove(sequence):
                return None
            self._outbox.forget(sequence)
        event = sequence.final_event(text, sequence.ending or reason, finished, error)
        try:
            sequence.sink(event)
        except Exception:
            log.exception("the receiver of request %r failed at its end", sequence.generation.request_id)
        with self._idle:
            if not self._book.open:
                self._idle.notify_all()
        return event
