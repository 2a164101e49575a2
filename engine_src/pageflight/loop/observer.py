"""What the front tells the metrics."""

from __future__ import annotations

import threading
from typing import Protocol

from pageflight.core.stats import CoreStats


class Observer(Protocol):
    """Metrics. Called on the response thread (and `refused` on the submitting one) for every event: must be cheap."""

    def first_token(self, seconds: float) -> None:
        """Since arrival."""

    def inter_token(self, seconds: float, count: int) -> None:
        """`count` tokens came `seconds` after the ones before them."""

    def finished(
        self, reason: str, end_to_end_s: float, queue_s: float, num_input_tokens: int, num_output_tokens: int
    ) -> None: ...

    def refused(self, reason: str) -> None:
        """Reason: the error's class name."""

    def core_stats(self, stats: CoreStats) -> None: ...

    def restarted(self, num_restarts: int, num_replayed: int) -> None:
        """Another core took over after so many restarts since the last call, and so many open sequences go on in it."""

    def poisoned(self) -> None:
        """A sequence was given up because it kills every core."""


class RoutingObserver(Observer, Protocol):
    """Of several cores."""

    def routed(self, instance: int) -> None:
        """A request goes to the core of this instance. Called on the submitting thread."""

    def rerouted(self, num_sequences: int) -> None:
        """So many sequences of a core that is gone go on in another."""


class SilentObserver:
    """A RoutingObserver that keeps nothing."""

    def first_token(self, seconds: float) -> None: ...
    def inter_token(self, seconds: float, count: int) -> None: ...
    def finished(
        self, reason: str, end_to_end_s: float, queue_s: float, num_input_tokens: int, num_output_tokens: int
    ) -> None: ...
    def refused(self, reason: str) -> None: ...
    def core_stats(self, stats: CoreStats) -> None: ...
    def restarted(self, num_restarts: int, num_replayed: int) -> None: ...
    def poisoned(self) -> None: ...
    def routed(self, instance: int) -> None: ...
    def rerouted(self, num_sequences: int) -> None: ...


class SharedObserver:
    """What one of several fronts tells the same observer, one at a time. `is_own`: its core is the one whose state and
    restarts are the observer's to tell."""

    def __init__(self, observer: Observer, lock: threading.Lock, *, is_own: bool) -> None:
        self._observer, self._lock, self._is_own = observer, lock, is_own

    def first_token(self, seconds: float) -> None:
        with self._lock:
            self._observer.first_token(seconds)

    def inter_token(self, seconds: float, count: int) -> None:
        with self._lock:
            self._observer.inter_token(seconds, count)

    def finished(
        self, reason: str, end_to_end_s: float, queue_s: float, num_input_tokens: int, num_output_tokens: int
    ) -> None:
        with self._lock:
            self._observer.finished(reason, end_to_end_s, queue_s, num_input_tokens, num_output_tokens)

    def refused(self, reason: str) -> None:
        with self._lock:
            self._observer.refused(reason)

    def core_stats(self, stats: CoreStats) -> None:
        if self._is_own:
            with self._lock:
                self._observer.core_stats(stats)

    def restarted(self, num_restarts: int, num_replayed: int) -> None:
        with self._lock:
            self._observer.restarted(num_restarts if self._is_own else 0, num_replayed)

    def poisoned(self) -> None:
        with self._lock:
            self._observer.poisoned()
