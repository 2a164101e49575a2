"""What the front tells the metrics."""

from __future__ import annotations

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


class SilentObserver:
    """An Observer that keeps nothing."""

    def first_token(self, seconds: float) -> None: ...
    def inter_token(self, seconds: float, count: int) -> None: ...
    def finished(
        self, reason: str, end_to_end_s: float, queue_s: float, num_input_tokens: int, num_output_tokens: int
    ) -> None: ...
    def refused(self, reason: str) -> None: ...
    def core_stats(self, stats: CoreStats) -> None: ...
    def restarted(self, num_restarts: int, num_replayed: int) -> None: ...
    def poisoned(self) -> None: ...
