"""Ranks that a Ray cluster starts on its machines: the answers of one rank, and words for what is not there."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

sys.path[:0] = [str(Path(__file__).parent), *(str(Path(__file__).parents[1] / name) for name in ("runners", "loop"))]

from engines import make_checkpoint, make_engine
from front_harness import Collector, NumberText, Recorder, eventually, generation
from ray_cluster import Machine, RayCluster

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig
from pageflight.core.errors import EngineLost, RanksMissing
from pageflight.loop.core_process import CoreSpec
from pageflight.loop.deaths import read_deaths
from pageflight.loop.front import Front
from pageflight.loop.local import start_core
from pageflight.loop.status import CoreStatus, read_status
from pageflight.loop.supervisor import SupervisorConfig

NUM_STREAMS, NUM_TOKENS = 4, 60


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """Of two machines, on the first of which cores are started."""
    running = RayCluster(Path(tmp_path_factory.mktemp("ray", numbered=True)))
    try:
        running.add()
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> CoreSpec:
    """A core of one rank."""
    folder = tmp_path_factory.mktemp("engine")
    make_checkpoint(folder / "checkpoint")
    engine = make_engine(folder / "checkpoint", folder / "engine", "torch")
    config = EngineConfig(
        kv=KVConfig(num_blocks=64),
        scheduler=SchedulerConfig(max_num_tokens=64, max_num_seqs=8, max_model_len=160),
        num_threads=2,
    )
    return CoreSpec(config=config, engine_dir=str(engine))


@pytest.fixture(scope="module")
def undisturbed(alone: CoreSpec) -> list[tuple[int, ...]]:
    """The ids of one rank."""
    with start_core(alone, NumberText()) as front:
        return [sink.wait().ids() for sink in streams(front)]


def streams(front: Front) -> list[Collector]:
    sinks = [Collector() for _ in range(NUM_STREAMS)]
    for index, sink in enumerate(sinks):
        front.submit(generation((index, 2, 3), max_tokens=NUM_TOKENS, temperature=1.0, seed=index), sink)
    return sinks


def spread(
    alone: CoreSpec, cluster: RayCluster, tensor_parallel: int, pipeline_parallel: int, *, nodes: int = 2, wait_s: float
) -> CoreSpec:
    config = replace(
        alone.config,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        launcher="ray",
        num_nodes=nodes,
        ray_address=cluster.address,
        rank_wait_s=wait_s,
    )
    return CoreSpec(config=config, engine_dir=alone.engine_dir)


@contextmanager
def serving(spec: CoreSpec, cluster: RayCluster, recorder: Recorder | None = None) -> Iterator[Front]:
    """A core on the first machine."""
    patience = SupervisorConfig(hang_limit_s=20.0, backoff_s=0.01)
    with cluster.head.entered(), start_core(spec, NumberText(), recorder, supervision=patience) as front:
        yield front


def status(front: Front) -> CoreStatus:
    found = read_status(front._address.status)
    assert found is not None
    return found


def ranks(machine: Machine) -> list[int]:
    """Numbers of the ranks that Ray has started on the machine."""
    commands = [" ".join(process.cmdline()) for process in machine.processes()]
    return sorted(int(line.rpartition("--rank=")[2].split()[0]) for line in commands if "--rank=" in line)


@pytest.mark.parametrize(("tensor_parallel", "pipeline_parallel"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_of_two_machines_give_the_ids_of_one(
    cluster: RayCluster,
    alone: CoreSpec,
    undisturbed: list[tuple[int, ...]],
    tensor_parallel: int,
    pipeline_parallel: int,
) -> None:
    with serving(spread(alone, cluster, tensor_parallel, pipeline_parallel, wait_s=60.0), cluster) as front:
        assert [sink.wait().ids() for sink in streams(front)] == undisturbed
