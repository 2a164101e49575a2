"""Where metrics go: the seam between what is counted here and who publishes it (Triton, or a test)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

Kind = Literal["counter", "gauge", "histogram"]


class Metric(Protocol):
    """One time series. Counters take `increment`, gauges `set`, histograms `observe`, and nothing else.

    It comes into being with `publish` or with the first value, so that making metrics costs no exchange.
    """

    def publish(self) -> None: ...

    def increment(self, value: float) -> None: ...

    def set(self, value: float) -> None: ...

    def observe(self, value: float) -> None: ...


class Exporter(Protocol):
    """Makes time series. Each call through a metric may cost tens of microseconds: an exchange between processes."""

    def metric(
        self, kind: Kind, name: str, description: str, labels: Mapping[str, str], buckets: Sequence[float] = ()
    ) -> Metric:
        """The time series of family `name` with `labels`; asking twice gives the same one."""
