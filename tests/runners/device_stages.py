"""Stages on our kernels as threads of this process, one of which computes at a time: Triton's interpreter is not made
for threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from thread_ranks import ThreadGroup
from thread_stages import Lines, StageCommunicator

from pageflight.core.config import EngineConfig
from pageflight.core.plan import StepPlan, StepResult
from pageflight.kv.capacity import Capacity
from pageflight.ranks.messages import digest_of
from pageflight.runners.device import DeviceRunner
from pageflight.runners.device_factory import load_on_gpu


class InTurn:
    """A rank's line. Who waits on it lets another one compute."""

    def __init__(self, line: StageCommunicator, turn: Lock) -> None:
        self.place, self._line, self._turn = line.place, line, turn

    def expect(self, results: torch.Tensor) -> Callable[[], object]:
        return self._waiting(self._line.expect(results))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return self._waiting(getattr(self._line, name))

    def _waiting(self, call: Callable[..., object]) -> Callable[..., object]:
        def waiting(*arguments: object) -> object:
            self._turn.release()
            try:
                return call(*arguments)
            finally:
                self._turn.acquire()

        return waiting


class DeviceStages:
    """Runners of all ranks as one runner; each must bring the same results."""

    def __init__(self, engine_dir: Path, config: EngineConfig, size: int, num_stages: int) -> None:
        self._ranks, lines = ThreadGroup(size * num_stages), Lines(size, num_stages)

        def load(line: StageCommunicator) -> tuple[DeviceRunner, Capacity]:
            communicator = InTurn(line, self._ranks.turn)
            return load_on_gpu(engine_dir, config, torch.device("cpu"), communicator=communicator)  # type: ignore[arg-type]

        loaded = self._ranks.each(load, lines.communicators)
        self.runners = [runner for runner, _ in loaded]
        self.capacity, self.limits = loaded[0][1], self.runners[0].limits

    def submit(self, plan: StepPlan) -> None:
        self._ranks.each(lambda runner: runner.submit(plan), self.runners)

    def collect(self) -> StepResult:
        first, *others = self._ranks.each(lambda runner: runner.collect(), self.runners)
        assert {digest_of(other) for other in others} == {digest_of(first)}
        return first

    def close(self) -> None:
        self._ranks.each(lambda runner: runner.close(), self.runners)
        self._ranks.close()
