"""Stages of one model as threads of this process: what they compute and tell each other is what processes do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue

import torch

from pageflight.core.plan import StepPlan, StepResult
from pageflight.models.stages import Place
from pageflight.ranks.messages import digest_of
from pageflight.runners.stage_runner import StageRunner

PATIENCE_S = 60.0


class Meeting:
    """Where threads leave tensors for each other."""

    def __init__(self, size: int) -> None:
        self.slots: list[torch.Tensor] = [torch.zeros(0)] * size
        self.barrier = threading.Barrier(size, timeout=PATIENCE_S)


class StageCommunicator:
    """One rank's line to all others."""

    def __init__(self, place: Place, lines: Lines) -> None:
        self.place, self._lines = place, lines

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self.all_gather(x).sum(0)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self._gathered(self._lines.stages[self.place.stage], self.place.shard.rank, x)

    def least(self, number: int) -> int:
        return int(self._gathered(self._lines.everybody, self.place.rank, torch.tensor(number)).min())

    def total(self, number: int) -> int:
        return int(self._gathered(self._lines.everybody, self.place.rank, torch.tensor(number)).sum())

    def pass_on(self, x: torch.Tensor) -> None:
        self._lines.passed[self.place.rank].put(x)

    def take_over(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(self._lines.passed[self.place.rank - self.place.tensor_parallel].get(timeout=PATIENCE_S))

    def announce(self, results: torch.Tensor) -> None:
        for rank in range(self.place.shard.rank, self.place.rank, self.place.tensor_parallel):
            self._lines.announced[rank].put(results)

    def hear(self, results: torch.Tensor) -> torch.Tensor:
        return results.copy_(self._lines.announced[self.place.rank].get(timeout=PATIENCE_S))

    def expect(self, results: torch.Tensor) -> Callable[[], object]:
        return partial(self.hear, results)

    def _gathered(self, meeting: Meeting, index: int, x: torch.Tensor) -> torch.Tensor:
        meeting.slots[index] = x
        meeting.barrier.wait()
        gathered = torch.stack(meeting.slots)
        meeting.barrier.wait()
        return gathered


class Lines:
    """What connects `num_stages` stages of `size` ranks."""

    def __init__(self, size: int, num_stages: int) -> None:
        num_ranks = size * num_stages
        self.stages = [Meeting(size) for _ in range(num_stages)]
        self.everybody = Meeting(num_ranks)
        self.passed: list[SimpleQueue[torch.Tensor]] = [SimpleQueue() for _ in range(num_ranks)]
        self.announced: list[SimpleQueue[torch.Tensor]] = [SimpleQueue() for _ in range(num_ranks)]
        places = [Place(rank=rank, tensor_parallel=size, pipeline_parallel=num_stages) for rank in range(num_ranks)]
        self.communicators = [StageCommunicator(place, self) for place in places]


class ThreadStages:
    """Runners of all stages as one runner; every rank must bring the same results."""

    def __init__(self, make: Callable[[StageCommunicator], StageRunner], size: int, num_stages: int) -> None:
        lines = Lines(size, num_stages)
        with ThreadPoolExecutor(size * num_stages) as pool:
            self.runners = list(pool.map(make, lines.communicators))
        self.limits = self.runners[0].limits

    def submit(self, plan: StepPlan) -> None:
        for runner in self.runners:
            runner.submit(plan)

    def collect(self) -> StepResult:
        first, *others = (runner.collect() for runner in self.runners)
        assert {digest_of(other) for other in others} <= {digest_of(first)}
        return first

    def close(self) -> None:
        for runner in self.runners:
            runner.close()
