"""A recorder without a file: what a machine did is replayed at its end."""

from __future__ import annotations

import numpy as np

from pageflight.core.plan import Finished, StepPlan, StepResult
from pageflight.loop.recorder import Recorder
from pageflight.loop.recording import (
    Called,
    Died,
    Entry,
    PlanEncoder,
    Planned,
    Settled,
    decode_frame,
    encode,
    encode_frame,
    settled_entry,
)


class MemoryRecorder(Recorder):
    """Encodes everything at once, as a Recorder does later."""

    def __init__(self) -> None:
        self._plans = PlanEncoder()
        self._encoded_entries: list[bytes] = []

    def add(self, entry: Called | Planned | Settled | Died) -> None:
        self._encoded_entries.append(encode(entry))

    def add_plan(self, now_s: float, plan: StepPlan) -> None:
        self.add(self._plans.entry(now_s, plan))

    def add_settled(self, now_s: float, result: StepResult, finished: tuple[Finished, ...], raised: str = "") -> None:
        self.add(settled_entry(np.uint16, now_s, result, finished, raised))

    def entries(self) -> list[Entry]:
        return decode_frame(encode_frame(self._encoded_entries))
