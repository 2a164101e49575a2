"""Notices clients that have gone, and passes on their word that they have.

Triton tells of the first only when asked, and asking is an exchange between processes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from pageflight.backend.answer import Reply

log = logging.getLogger(__name__)

SHARE = 0.02
"""Of one core, at most, goes into asking."""
ASK_COST_S = 60e-6
MIN_INTERVAL_S = 0.01


class CancellationWatch:
    """A thread that asks each open request in turn whether it was cancelled, at a bounded total cost.

    With 3 open requests each is asked 100 times a second, with 32 about 10 times. It sleeps while none is open.
    """

    def __init__(self, look: Callable[[], None] = lambda: None) -> None:
        """`look` is called in every round, on the watch's thread."""
        self._look = look
        self._changed = threading.Condition()
        self._open: dict[Reply, tuple[str, Callable[[], None]]] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="cancellation", daemon=True)
        self._thread.start()

    def add(self, reply: Reply, request_id: str, cancel: Callable[[], None]) -> None:
        """`cancel` is called, on the watch's thread, if the request is cancelled before it is over."""
        with self._changed:
            self._open[reply] = (request_id, cancel)
            if len(self._open) == 1:
                self._changed.notify()

    def cancel(self, request_id: str) -> bool:
        """Cancel the open requests with this id; whether there were any."""
        with self._changed:
            found = [
                cancel for reply, (known, cancel) in self._open.items() if known == request_id and not reply.is_over
            ]
        for cancel in found:
            cancel()
        return bool(found)

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._open or self._closing)
                if not self._closing:
                    self._changed.wait(max(MIN_INTERVAL_S, len(self._open) * ASK_COST_S / SHARE))
                if self._closing:
                    return
                watched = list(self._open.items())
            self._look()
            for reply, (_, cancel) in watched:
                try:
                    cancelled = reply.is_cancelled()
                    if cancelled:
                        cancel()
                except Exception:
                    log.exception("a request could not be asked whether it was cancelled; it is not asked again")
                    cancelled = True
                if cancelled or reply.is_over:
                    with self._changed:
                        self._open.pop(reply, None)
