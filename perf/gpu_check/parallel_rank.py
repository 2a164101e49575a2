"""One rank of the part `parallel`, in a process of its own: it runs the plans that it is sent, and times messages."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import patch

import torch

from pageflight.core.config import EngineConfig
from pageflight.core.plan import StepPlan, StepResult
from pageflight.kv.capacity import FreeMemory
from pageflight.models.stages import Place
from pageflight.ranks.local_launcher import LOOPBACK
from pageflight.ranks.process_group import GroupCommunicator, reach_store
from pageflight.runners import device_factory
from pageflight.runners.base import RunnerLimits
from pageflight.runners.device import DeviceRunner
from perf.gpu_check.card import Record
from perf.gpu_check.tensorrt_ranks import load_rank

HIDDEN_SIZE = 8192
"""Of the messages that are timed: a 70B model's, in two bytes."""
ENOUGH = FreeMemory(num_bytes=1 << 30, source="of the host, more than a check takes")
"""It would ask psutil, which may not be there."""


@dataclass(frozen=True, slots=True)
class Collect:
    """Asks for a StepResult."""


@dataclass(frozen=True, slots=True)
class Measure:
    """Asks for a Record: messages of so many tokens, so often."""

    token_counts: tuple[int, ...]
    rounds: int


@dataclass(frozen=True, slots=True)
class Failed:
    """Last words."""

    message: str


ToRank = StepPlan | Collect | Measure | None
FromRank = RunnerLimits | StepResult | Record | Failed


def serve(place: Place, port: int, is_gpu: bool, folder: Path, config: EngineConfig, line: Connection) -> None:
    """Load the rank's part, say its limits, and do as told until the end is: None."""
    device = torch.device("cuda", place.rank) if is_gpu else torch.device("cpu")
    try:
        if is_gpu:
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(1)
        communicator = GroupCommunicator(place, reach_store(LOOPBACK, port), device, LOOPBACK)
        with (
            patch.object(device_factory, "free_memory", lambda: ENOUGH),
            patch.object(device_factory, "load_segments", load_rank),
        ):
            runner, _ = device_factory.load_on_gpu(folder, config, device, communicator=communicator)
        line.send(runner.limits)
        _run(runner, communicator, device, line)
        runner.close()
        communicator.least(0)  # nobody leaves while another one may still be reading
        communicator.close()
    except Exception as error:
        line.send(Failed(f"rank {place.rank}: {type(error).__name__}: {error}"))
    os._exit(0)  # threads of gloo may be there yet, which an interpreter that ends calls a failure


def _run(runner: DeviceRunner, communicator: GroupCommunicator, device: torch.device, line: Connection) -> None:
    while (message := line.recv()) is not None:
        if isinstance(message, StepPlan):
            runner.submit(message)
        elif isinstance(message, Collect):
            line.send(runner.collect())
        else:
            line.send(_measured(communicator, device, message))


def _measured(communicator: GroupCommunicator, device: torch.device, measure: Measure) -> Record:
    """Microseconds of a sum over the ranks of a stage, and of a hidden state to the next stage and ids back."""
    place, found = communicator.place, {}
    for count in measure.token_counts:
        x = torch.zeros(count, HIDDEN_SIZE, dtype=torch.bfloat16, device=device)
        ids = torch.zeros(3, count, dtype=torch.int32, device=device)

        def there_and_back(x: torch.Tensor = x, ids: torch.Tensor = ids) -> None:
            if place.stage:
                communicator.take_over(x)
            if place.stage == place.pipeline_parallel - 1:
                communicator.announce(ids)
            else:
                communicator.pass_on(x)
                communicator.hear(ids)

        if place.tensor_parallel > 1:
            found[f"sum_us_{count}"] = _microseconds(partial(communicator.all_reduce, x), device, measure.rounds)
        if place.pipeline_parallel > 1:
            found[f"there_and_back_us_{count}"] = _microseconds(there_and_back, device, measure.rounds)
    return dict(found)


def _microseconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Mean of so many, one after another, after one that is not counted."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin_s = time.perf_counter()
    for _ in range(rounds):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return round((time.perf_counter() - begin_s) / rounds * 1e6, 1)
