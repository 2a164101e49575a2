"""When graphs are captured, and what remains where that fails: on a device that only counts."""

from __future__ import annotations

import logging
import weakref
from collections import defaultdict
from itertools import count
from typing import Any

import pytest
import torch

from pageflight.runners.device_graphs import PATIENCE, RUNS_BEFORE, Graphs


class Device:
    """What torch does about graphs: its stream is current while one is captured, and stays so after a failure; what
    cuBLAS works on lies for ever in the pool of the first capture, and such a pool takes no graph once it has none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.num_replays, self.first_pool = "steps", 0, -1
        self.errors: list[str] = []  # of the captures to come
        self.num_captures, self.cuda_stream = 0, 5
        self.living: defaultdict[int, weakref.WeakSet[Any]] = defaultdict(weakref.WeakSet)
        device, pools = self, count()

        class Graph:
            def replay(self) -> None:
                device.num_replays += 1

        class Capture:
            def __init__(self, graph: Graph, pool: int) -> None:
                self.graph, self.pool = graph, pool

            def __enter__(self) -> None:
                device.stream = "captures"
                device.num_captures += 1
                if self.pool == device.first_pool and not device.living[self.pool]:
                    raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
                if device.first_pool < 0:
                    device.first_pool = self.pool
                if device.errors:
                    raise RuntimeError(device.errors.pop(0))
                device.living[self.pool].add(self.graph)

            def __exit__(self, *error: object) -> None:
                device.stream = "steps"

        for name, value in {
            "CUDAGraph": Graph,
            "graph": Capture,
            "graph_pool_handle": lambda: next(pools),
            "synchronize": lambda device: None,
            "current_stream": lambda device: self,
            "set_stream": lambda steps: setattr(self, "stream", "steps"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


@pytest.fixture
def graphs(device: Device) -> Graphs:
    return Graphs(decode, 8, torch.device("cuda"), is_used=True)


def decode(staged: Any, filters: bool, adjusts: bool) -> torch.Tensor:
    return torch.zeros(1)


def run(graphs: Graphs, num_rows: int, times: int = RUNS_BEFORE) -> None:
    step = type("Step", (), {"rows_S": torch.zeros(num_rows)})()
    for _ in range(times):
        graphs.run(step, False, False)


def test_released_graphs_are_captured_again_but_later(device: Device, graphs: Graphs) -> None:
    """Graphs that were captured again at once would take the memory that they were given up for; and what they left in
    their pool made torch refuse all others."""
    run(graphs, 2, 2 * RUNS_BEFORE)
    assert (device.num_captures, device.num_replays) == (1, RUNS_BEFORE)
    graphs.release()
    run(graphs, 2, RUNS_BEFORE * PATIENCE)
    assert (device.num_captures, device.num_replays) == (2, RUNS_BEFORE)
    run(graphs, 2, 1)
    assert device.num_replays == RUNS_BEFORE + 1


def test_a_failed_capture_is_the_last_one(device: Device, graphs: Graphs, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be captured was tried with every size, and steps went on on the stream of the capture."""
    caplog.set_level(logging.WARNING, "pageflight.runners.device_graphs")
    run(graphs, 1)
    device.errors = ["operation not permitted when stream is capturing\nand advice"]
    run(graphs, 2)
    assert device.stream == "steps"
    for num_rows in (2, 4, 8):
        run(graphs, num_rows, 2 * RUNS_BEFORE)
    assert device.num_captures == 2 and device.num_replays == 0
    run(graphs, 1)
    assert device.num_replays == RUNS_BEFORE, "what was captured before goes on"
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "no graph of 2 rows, nor of any size from now on"
    ]


def test_a_capture_that_lacks_memory_leaves_other_sizes_theirs(device: Device, graphs: Graphs) -> None:
    """The pool of a first capture that failed was refused from then on."""
    device.errors = ["CUDA out of memory. Tried to allocate 2.00 GiB"]
    run(graphs, 8, 2 * RUNS_BEFORE)
    run(graphs, 2, RUNS_BEFORE + 1)
    run(graphs, 4, RUNS_BEFORE + 1)
    assert (device.num_captures, device.num_replays, device.stream) == (3, 2, "steps")


def test_a_model_that_cannot_be_captured_is_not(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    """TensorRT knows of steps that a capture would fail on, and after a failure torch captures nothing else."""
    caplog.set_level(logging.WARNING, "pageflight.runners.device_graphs")
    asked: list[int] = []
    refuse = lambda stream: bool(asked.append(stream))  # noqa: E731
    graphs = Graphs(decode, 8, torch.device("cuda"), is_used=True, is_capturable=refuse)
    run(graphs, 2, 2 * RUNS_BEFORE)
    run(graphs, 4, 2 * RUNS_BEFORE)
    assert asked == [5] and device.num_captures == device.num_replays == 0
    assert "no graph of 2 rows, nor of any size from now on: the model's steps cannot be captured" in caplog.text
