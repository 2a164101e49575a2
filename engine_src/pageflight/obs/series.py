"""Accumulators that cost nothing where tokens pass, and one exchange per change where they are flushed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from pageflight.obs.exporter import Exporter, Metric


class Counter:
    """A number that only grows."""

    __slots__ = ("_flushed", "_metric", "total")

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self.total = 0.0
        self._flushed: float | None = None

    def flush(self) -> None:
        total = self.total
        if self._flushed is None:
            self._metric.publish()  # it shows as 0 before anything has happened
            self._flushed = 0.0
        if total != self._flushed:
            self._metric.increment(total - self._flushed)
            self._flushed = total


class Gauge:
    """A number as it is now."""

    __slots__ = ("_flushed", "_metric", "value")

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self.value = 0.0
        self._flushed: float | None = None

    def flush(self) -> None:
        value = self.value
        if value != self._flushed:
            self._metric.set(value)
            self._flushed = value


class RequestHistogram:
    """A real histogram, for what happens once per request: one exchange per value, when it is flushed."""

    __slots__ = ("_is_published", "_metric", "_values")

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._is_published = False
        self._values: list[float] = []

    def observe(self, value: float) -> None:
        self._values.append(value)

    def flush(self) -> None:
        if not self._is_published:
            self._metric.publish()
            self._is_published = True
        values, self._values = self._values, []
        for value in values:
            self._metric.observe(value)


class TokenHistogram:
    """A histogram for what happens once per token, flushed in a few exchanges however many values there were.

    Triton's histograms take one value per call, so this one is published as the counters that a histogram consists of,
    `NAME_bucket{le=…}`, `NAME_sum` and `NAME_count`, which Prometheus' `histogram_quantile` reads all the same.
    """

    __slots__ = ("_buckets", "_count", "_counts", "_edges", "_sum")

    def __init__(
        self, exporter: Exporter, name: str, description: str, labels: Mapping[str, str], edges: Sequence[float]
    ) -> None:
        self._edges = tuple(edges)
        self._counts = [0] * (len(self._edges) + 1)
        self._buckets = [
            Counter(exporter.metric("counter", f"{name}_bucket", description, {**labels, "le": le}))
            for le in (*(f"{edge:g}" for edge in self._edges), "+Inf")
        ]
        self._sum = Counter(exporter.metric("counter", f"{name}_sum", description, labels))
        self._count = Counter(exporter.metric("counter", f"{name}_count", description, labels))

    def observe(self, value: float, count: int) -> None:
        """`count` times `value`."""
        self._counts[bisect_left(self._edges, value)] += count
        self._sum.total += value * count

    def flush(self) -> None:
        total = 0
        for bucket, count in zip(self._buckets, tuple(self._counts), strict=True):
            total += count
            bucket.total = total
            bucket.flush()
        self._sum.flush()
        self._count.total = total
        self._count.flush()
