"""A FakeRunner that takes two steps before it gives back the first, as a GPU's queue does."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from pageflight.core.plan import StepPlan, StepResult
from pageflight.runners.base import RunnerLimits
from pageflight.runners.fake import FakeRunner


class DeepFakeRunner:
    """Computes plans in order, each after the one before it, whenever they were submitted."""

    def __init__(self, limits: RunnerLimits, max_in_flight: int = 2) -> None:
        self.limits = replace(limits, max_in_flight=max_in_flight)
        self._runner = FakeRunner(limits)
        self._submitted: deque[StepPlan] = deque()

    def submit(self, plan: StepPlan) -> None:
        self._submitted.append(plan)
        assert len(self._submitted) <= self.limits.max_in_flight, "a plan was submitted before an earlier was collected"

    def collect(self) -> StepResult:
        assert self._submitted, "nothing was submitted"
        self._runner.submit(self._submitted.popleft())
        return self._runner.collect()

    def close(self) -> None:
        self._runner.close()
