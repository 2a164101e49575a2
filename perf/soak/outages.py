"""When which model was away because its process had been killed: only then may requests to it be lost or refused."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass


@dataclass(slots=True)
class Outage:
    model: str
    begin_s: float
    end_s: float = math.inf


class Outages:
    """Written by the killer, read by the judge. Safe to use from several threads."""

    def __init__(self) -> None:
        self._all: list[Outage] = []
        self._lock = threading.Lock()

    def begin(self, model: str, now_s: float) -> Outage:
        outage = Outage(model, now_s)
        with self._lock:
            self._all.append(outage)
        return outage

    def excuse(self, models: frozenset[str], started_s: float, ended_s: float) -> bool:
        """Whether one of `models` was away at some time between the two."""
        with self._lock:
            return any(
                outage.model in models and outage.begin_s <= ended_s and started_s <= outage.end_s
                for outage in self._all
            )

    @property
    def never_ended(self) -> list[str]:
        with self._lock:
            return [outage.model for outage in self._all if math.isinf(outage.end_s)]
