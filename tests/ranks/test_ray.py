"""Ranks that a Ray cluster starts on its machines: the answers of one rank, and words for what is not there."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from engines import make_checkpoint, make_engine, serve
from front_harness import Collector, NumberText, Recorder, eventually, generation
from ray_cluster import Machine, RayCluster, why_not_isolated
from servers import running_server
from tiny_checkpoint import make_tiny_checkpoint

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig
from pageflight.core.errors import EngineLost, RanksMissing
from pageflight.core.request import Request, SamplingParams
from pageflight.loop.core_process import CoreSpec
from pageflight.loop.deaths import read_deaths
from pageflight.loop.front import Front
from pageflight.loop.local import start_core
from pageflight.loop.status import CoreStatus, read_status
from pageflight.loop.supervisor import SupervisorConfig
from pageflight.ranks.key import KEY
from pageflight.ranks.ray_line import RayLine
from pageflight.ranks.ray_messages import Kill, Start, Wanted
from pageflight.text.tokenizer import Tokenizer
from pageflight_build.options import BuildOptions, EngineOptions, ServingOptions
from pageflight_build.recipe import build

NUM_STREAMS, NUM_TOKENS = 4, 60
RANKS, STAGES, BOTH = (2, 1, 60.0), (1, 2, 12.0), (2, 2, 60.0)
"""Ranks of a layer, stages, and seconds that a core waits for them."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """Of two machines, on the first of which cores are started."""
    running = RayCluster(why_not_isolated())
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
        num_threads=1,
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
    alone: CoreSpec,
    cluster: RayCluster,
    tensor_parallel: int,
    pipeline_parallel: int,
    *,
    nodes: int = 2,
    wait_s: float = 60.0,
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


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def front(request: pytest.FixtureRequest, cluster: RayCluster, alone: CoreSpec, recorder: Recorder) -> Iterator[Front]:
    """Of a core of so many ranks and stages on two machines, and how long it waits for them."""
    tensor_parallel, pipeline_parallel, wait_s = request.param
    with serving(
        spread(alone, cluster, tensor_parallel, pipeline_parallel, wait_s=wait_s), cluster, recorder
    ) as running:
        yield running


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


def isolated(cluster: RayCluster) -> None:
    """Nodes that can be killed as machines are."""
    if cluster.why_not_isolated:
        pytest.skip(f"no network namespaces: {cluster.why_not_isolated}")


def test_a_server_answers_with_ranks_of_two_machines(cluster: RayCluster, tmp_path: Path) -> None:
    vocab_size = make_tiny_checkpoint(tmp_path / "checkpoint")
    options = BuildOptions(
        checkpoint=tmp_path / "checkpoint",
        repository=tmp_path / "repository",
        name="tiny",
        engine=EngineOptions(engine="torch", dtype="fp32"),
        serving=ServingOptions(
            kv_memory=8 << 20,
            threads=1,
            pipeline_parallel=2,
            launcher="ray",
            nodes=2,
            ray_address=cluster.address,
        ),
    )
    build(options)
    engine_dir, prompt, num_tokens = tmp_path / "repository/engine/1/artifacts", "of two machines", 24
    tokenizer = Tokenizer.load(engine_dir / "tokenizer")
    asked = Request(
        handle=0, prompt_ids=tuple(tokenizer.encode(prompt)), sampling=SamplingParams(max_tokens=num_tokens)
    )
    alone_text = tokenizer.decode(serve(engine_dir, [asked]).ids[0])
    with cluster.head.entered(), running_server(tmp_path / "repository", "tiny", vocab_size) as server:
        text = server.text(text_input=prompt, max_tokens=num_tokens)
        assert not cluster.is_isolated or [ranks(machine) for machine in cluster.machines] == [[], [1]]
    assert text == alone_text


def test_every_rank_has_a_gpu_that_no_other_has(cluster: RayCluster) -> None:
    """The core's own process is none of Ray's: it took the GPU that Ray had given to another rank. Ray counts GPUs that
    it was told of; nobody computes here."""
    isolated(cluster)
    wanted = Wanted(address=cluster.address, num_nodes=2, ranks_per_node=2, resource="GPU", amount=1, wait_s=60.0)
    with cluster.head.entered():
        line = RayLine(wanted, print)
    placed = line.placed()
    command = ("pageflight.runners.rank_worker", f"--connect={cluster.head.address}:1", "--wait-s=60")
    line.send(Start({rank: (*command, f"--rank={rank}") for rank in (1, 2, 3)}, {KEY: "nobody has this one"}))
    second = next(machine for machine in cluster.machines if machine.address == placed.addresses[1])
    eventually(lambda: [ranks(machine) for machine in (cluster.head, second)] == [[1], [2, 3]], "they are started")
    seen = [
        sorted(process.environ()["CUDA_VISIBLE_DEVICES"] for process in rank_processes(machine))
        for machine in (cluster.head, second)
    ]
    assert sorted([placed.gpu, *seen[0]]) == seen[1] == ["0", "1"]
    line.send(Kill(2))
    ended = line.over(2, wait_s=60.0)
    assert ended is not None and ended.return_code == -signal.SIGKILL and ended.words.startswith("Ray says")
    line.close()
    eventually(lambda: not ranks(cluster.head) and not ranks(second), "nothing outlives the driver")


def test_a_cluster_that_is_too_small_is_refused_in_words(cluster: RayCluster, alone: CoreSpec) -> None:
    wanted = "no room .* within rank_wait_s=1: wanted are 4 machines, this one .* among them, with 1 CPU free each"
    spec = spread(alone, cluster, 4, 1, nodes=4, wait_s=1.0)
    with pytest.raises(RanksMissing, match=wanted), serving(spec, cluster):
        pass


@pytest.mark.parametrize("front", [RANKS], indirect=True)
def test_ranks_of_two_machines_give_the_ids_of_one(
    cluster: RayCluster, front: Front, undisturbed: list[tuple[int, ...]]
) -> None:
    """And as fast: Ray starts its processes at nice 15, and every step waited for a rank that others went before."""
    assert [sink.wait().ids() for sink in streams(front)] == undisturbed
    if cluster.is_isolated:
        assert [ranks(machine) for machine in cluster.machines] == [[], [1]]
        assert [process.nice() for process in rank_processes(cluster.machines[1])] == [
            os.getpriority(os.PRIO_PROCESS, 0)
        ]


@pytest.mark.parametrize("front", [RANKS], indirect=True)
def test_the_node_of_the_core_may_come_back(
    cluster: RayCluster, front: Front, undisturbed: list[tuple[int, ...]]
) -> None:
    """Ray ends what a lost node has asked for, and may end the process as well: a core would have died without a word,
    and as its streams' fault."""
    isolated(cluster)
    core, sinks = status(front).core_pid, streams(front)
    (raylet,) = (process for process in cluster.head.processes() if process.name() == "raylet")
    raylet.kill()

    def is_gone() -> bool:  # streams go on until Ray ends the ranks
        if all(sink.finals for sink in sinks):
            sinks.extend(streams(front))
        return status(front).core_pid != core

    eventually(is_gone, "Ray gives up what the node had asked for")
    assert "Ray says" in status(front).message
    cluster.start_node(cluster.head)
    assert [sink.wait().ids() for sink in sinks] == undisturbed * (len(sinks) // NUM_STREAMS)
    eventually(lambda: status(front).state == "ready", "the core is back")
    assert not any(death.of_itself for death in read_deaths(front._address.deaths).values())


@pytest.mark.parametrize("front", [BOTH], indirect=True)
def test_stages_of_ranks_on_two_machines_give_the_ids_of_one(
    cluster: RayCluster, front: Front, undisturbed: list[tuple[int, ...]]
) -> None:
    assert [sink.wait().ids() for sink in streams(front)] == undisturbed
    assert not cluster.is_isolated or [ranks(machine) for machine in cluster.machines] == [[1], [2, 3]]


@pytest.mark.parametrize("victim", ["core", "driver"])
@pytest.mark.parametrize("front", [BOTH], indirect=True)
def test_a_killed_core_leaves_nothing_on_any_machine(
    cluster: RayCluster, front: Front, recorder: Recorder, undisturbed: list[tuple[int, ...]], victim: str
) -> None:
    """What a dead core had reserved would have kept its successor out, which needs all that Ray has here; and ranks
    went on without the driver that Ray knew them by."""
    isolated(cluster)
    core = psutil.Process(status(front).core_pid)
    (driver,) = (child for child in core.children() if "ray_driver" in " ".join(child.cmdline()))
    before = [process for machine in cluster.machines for process in rank_processes(machine)]
    sinks = streams(front)
    sinks[0].wait(lambda: sinks[0].num_ids > 6)
    (core if victim == "core" else driver).kill()
    eventually(lambda: not any(process.is_running() for process in (*before, core, driver)), "nothing outlives either")
    assert len(before) == 3 and [sink.wait().ids() for sink in sinks] == undisturbed
    assert recorder.restarts[-1][1] > 0, "streams were to be open"
    assert not any(death.of_itself for death in read_deaths(front._address.deaths).values())


@pytest.mark.parametrize("front", [STAGES], indirect=True)
def test_a_lost_machine_is_a_pause_where_another_has_room_and_an_error_where_none_has(
    cluster: RayCluster, front: Front, recorder: Recorder, undisturbed: list[tuple[int, ...]]
) -> None:
    """Streams waited for ever for a machine that nobody would start again."""
    isolated(cluster)
    spare = cluster.add()
    first = next(machine for machine in cluster.machines if ranks(machine))
    num_restarts = len(recorder.restarts)
    sinks = streams(front)
    sinks[0].wait(lambda: sinks[0].num_ids > 6)
    first.kill_all()
    assert [sink.wait().ids() for sink in sinks] == undisturbed
    assert len(recorder.restarts) > num_restarts and recorder.restarts[-1][1] > 0, "streams were to be open"
    assert ranks(spare) == [1]
    sinks = streams(front)
    sinks[0].wait(lambda: sinks[0].num_ids > 6)
    spare.kill_all()
    errors = [sink.wait().finals[0].error for sink in sinks]
    assert all(isinstance(error, EngineLost) for error in errors)
    assert all("no room for the ranks within rank_wait_s=12" in str(error) for error in errors)
    with pytest.raises(EngineLost):
        front.submit(generation((1, 2, 3)), Collector())
