"""Whether memory grows: samples of resident size over time, and the slope of a straight line through them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from perf.processes import Life, Sample

MIN_SAMPLES = 60
"""A minute. In less than that one larger batch looks like growth."""
Point = tuple[float, float]  # seconds, KiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """Of one role. `slope_kib_min` is None where its processes did not live long enough to tell."""

    role: str
    slope_kib_min: float | None
    num_samples: int
    first_kib: int  # of all its processes together, at the first sample with as many as at the last
    last_kib: int


class Memory:
    """Resident sizes of all processes, once a second."""

    def __init__(self) -> None:
        self._points: dict[Life, list[Point]] = defaultdict(list)

    def add(self, now_s: float, samples: Iterable[Sample]) -> None:
        for sample in samples:
            self._points[sample.life].append((now_s, sample.rss_kib))

    def growth(self, begin_s: float, end_s: float) -> list[Growth]:
        """By role, between two moments."""
        lives: dict[str, list[list[Point]]] = defaultdict(list)
        for life, points in self._points.items():
            inside = [point for point in points if begin_s <= point[0] <= end_s]
            if inside:
                lives[life.role].append(inside)
        return [
            Growth(
                role=role,
                slope_kib_min=slope(series),
                num_samples=sum(map(len, series)),
                first_kib=round(max(points[0][1] for points in series)),
                last_kib=round(max(points[-1][1] for points in series)),
            )
            for role, series in sorted(lives.items())
        ]


def slope(series: Sequence[Sequence[Point]]) -> float | None:
    """KiB per minute by least squares: one slope for all processes of a role, and an offset for each.

    A process that was started again begins at another size, which is no growth. None for too few samples.
    """
    long_enough = [points for points in series if len(points) >= MIN_SAMPLES]
    if not long_enough:
        return None
    covariance = variance = 0.0
    for points in long_enough:
        mean_s = sum(at_s for at_s, _ in points) / len(points)
        mean_kib = sum(kib for _, kib in points) / len(points)
        covariance += sum((at_s - mean_s) * (kib - mean_kib) for at_s, kib in points)
        variance += sum((at_s - mean_s) ** 2 for at_s, _ in points)
    return 60 * covariance / variance if variance else None
