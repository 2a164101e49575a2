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
    alone: CoreSpec, cluster: RayCluster, tensor_parallel: int, pipeline_parallel: int, *, nodes: int = 2, wait_s: float = 60.0
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


def rank_processes(machine: Machine) -> list[psutil.Process]:
    """The ranks that Ray has started on the machine."""
    return [process for process in machine.processes() if "--rank=" in " ".join(process.cmdline())]


def ranks(machine: Machine) -> list[int]:
    """Their numbers."""
    commands = [" ".join(process.cmdline()) for process in rank_processes(machine)]
    return sorted(int(line.rpartition("--rank=")[2].split()[0]) for line in commands)


@pytest.mark.parametrize(("tensor_parallel", "pipeline_parallel"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_of_two_machines_give_the_ids_of_one(
    cluster: RayCluster,
    alone: CoreSpec,
    undisturbed: list[tuple[int, ...]],
    tensor_parallel: int,
    pipeline_parallel: int,
) -> None:
    with serving(spread(alone, cluster, tensor_parallel, pipeline_parallel), cluster) as front:
        assert [sink.wait().ids() for sink in streams(front)] == undisturbed
        if cluster.why_not_isolated:
            return
        num_ranks = tensor_parallel * pipeline_parallel
        assert [ranks(machine) for machine in cluster.machines] == [[*range(1, num_ranks)][: num_ranks // 2 - 1], [*range(num_ranks // 2, num_ranks)]]


def test_a_killed_core_leaves_nothing_on_any_machine(
    cluster: RayCluster, alone: CoreSpec, undisturbed: list[tuple[int, ...]]
) -> None:
    """Ray has actors of its drivers in other hands: what a dead core had reserved would have kept its successor out."""
    isolated(cluster)
    recorder = Recorder()
    with serving(spread(alone, cluster, 2, 2), cluster, recorder) as front:
        sinks, core = streams(front), status(front).core_pid
        before = [process for machine in cluster.machines for process in rank_processes(machine)]
        assert len(before) == 3
        sinks[0].wait(lambda: sinks[0].num_ids > 6)
        os.kill(core, signal.SIGKILL)
        eventually(lambda: not any(process.is_running() for process in before), "no rank outlives its core")
        assert [sink.wait().ids() for sink in sinks] == undisturbed
        assert recorder.restarts[-1][1] > 0, "streams were to be open"


def test_the_node_of_the_core_may_come_back(
    cluster: RayCluster, alone: CoreSpec, undisturbed: list[tuple[int, ...]]
) -> None:
    """A process of Ray's is ended by Ray when its node is; a core would have died without a word, and as its streams'
    fault."""
    isolated(cluster)
    recorder = Recorder()
    with serving(spread(alone, cluster, 2, 1), cluster, recorder) as front:
        sinks, core = streams(front), status(front).core_pid
        sinks[0].wait(lambda: sinks[0].num_ids > 6)
        (raylet,) = (process for process in cluster.head.processes() if process.name() == "raylet")
        raylet.kill()
        eventually(lambda: status(front).core_pid != core, "the core ends with its ranks")
        print(status(front))
        cluster.start_node(cluster.head)
        assert [sink.wait().ids() for sink in sinks] == undisturbed
        eventually(lambda: status(front).state == "ready", "it comes back")
        assert not any(death.of_itself for death in read_deaths(front._address.deaths).values())
        assert streams(front)[0].wait().ids() == undisturbed[0]


def test_a_lost_machine_is_a_pause_where_another_has_room_and_an_error_where_none_has(
    cluster: RayCluster, alone: CoreSpec, undisturbed: list[tuple[int, ...]]
) -> None:
    """Streams waited for ever for a machine that nobody would start again."""
    isolated(cluster)
    recorder = Recorder()
    cluster.add()
    with serving(spread(alone, cluster, 1, 2, wait_s=8.0), cluster, recorder) as front:
        for last in (False, True):
            (machine,) = (each for each in cluster.machines if ranks(each) == [1])
            sinks = streams(front)
            sinks[0].wait(lambda sinks=sinks: sinks[0].num_ids > 6)
            machine.kill_all()
            finals = [sink.wait().finals[0] for sink in sinks]
            if not last:
                assert [sink.ids() for sink in sinks] == undisturbed
                assert recorder.restarts[-1][1] > 0, "streams were to be open"
        assert all(isinstance(final.error, EngineLost) for final in finals)
        print(finals[0].error)


def test_a_cluster_that_is_too_small_is_refused_in_words(cluster: RayCluster, alone: CoreSpec) -> None:
    message = "no room for the ranks within rank_wait_s=1: wanted are 4 machines, this one .* among them, with 2 CPU free each"
    with pytest.raises(RanksMissing, match=message), serving(spread(alone, cluster, 4, 1, nodes=4, wait_s=1.0), cluster):
        pass


def isolated(cluster: RayCluster) -> None:
    """Nodes that can be killed as machines are."""
    if cluster.why_not_isolated:
        pytest.skip(f"no network namespaces: {cluster.why_not_isolated}")
