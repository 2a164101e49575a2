"""Ranks of another machine: they dial in, work, vanish and come back, and clients notice the time it takes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from engines import make_checkpoint, make_engine, serve, serve_on
from front_harness import Collector, NumberText, Recorder, eventually, generation
from joined import config_of, free_port, joining, network, workers

from pageflight.core.config import EngineConfig
from pageflight.core.errors import EngineLost, RankLost, RanksMissing
from pageflight.core.request import Request, SamplingParams
from pageflight.loop import local
from pageflight.loop.core_process import CoreSpec, core_command
from pageflight.loop.deaths import read_deaths
from pageflight.loop.front import Front
from pageflight.loop.local import start_core
from pageflight.loop.status import CoreStatus, read_status
from pageflight.loop.supervisor import SupervisorConfig
from pageflight.models.stages import Place
from pageflight.ranks.external_launcher import EVERY_RANK_JOINS, ExternalLauncher
from pageflight.runners.factory import load_engine

NUM_STREAMS, NUM_TOKENS = 4, 100


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("machines")
    make_checkpoint(folder / "checkpoint")
    return make_engine(folder / "checkpoint", folder / "engine", "torch")


def sampling(index: int) -> dict[str, object]:
    return {"max_tokens": NUM_TOKENS, "temperature": 1.0, "seed": index}


def requests() -> list[Request]:
    return [
        Request(handle=index, prompt_ids=(index + 2, 2, 3), sampling=SamplingParams(**sampling(index)))
        for index in range(NUM_STREAMS)
    ]


@pytest.fixture(scope="module")
def alone(engine: Path) -> list[tuple[int, ...]]:
    """The answers of one rank."""
    served = serve(engine, requests())
    return [tuple(served.ids[index]) for index in range(NUM_STREAMS)]


def streams(front: Front) -> list[Collector]:
    sinks = [Collector() for _ in range(NUM_STREAMS)]
    for index, sink in enumerate(sinks):
        front.submit(generation((index + 2, 2, 3), **sampling(index)), sink)
    return sinks


def status(front: Front) -> CoreStatus:
    found = read_status(front._address.status)
    assert found is not None
    return found


@contextmanager
def started(engine: Path, config: EngineConfig, recorder: Recorder | None = None) -> Iterator[Front]:
    spec = CoreSpec(config=config, engine_dir=str(engine))
    patience = SupervisorConfig(hang_limit_s=30.0, backoff_s=0.01)
    with start_core(spec, NumberText(), recorder, ready_timeout_s=60.0, supervision=patience) as front:
        yield front


def test_a_joined_rank_serves_what_one_serves_and_may_be_killed(engine: Path, alone: list[tuple[int, ...]]) -> None:
    """Two machines that are this one: the ids of one rank; the joined rank killed under streams is a pause; what
    joined comes back by itself, and ends when it is told to."""
    port, recorder = free_port(), Recorder()
    with joining(engine, f"127.0.0.2:{port}") as join:
        with started(engine, config_of(port, tensor_parallel=2), recorder) as front:
            assert [sink.wait().ids() for sink in streams(front)] == alone
            assert not psutil.Process(status(front).core_pid).children(), "every other rank is elsewhere"
            (rank,) = workers(join)
            sinks = streams(front)
            sinks[0].wait(lambda: sinks[0].num_ids > 6)
            os.kill(rank.pid, signal.SIGKILL)
            assert [sink.wait().ids() for sink in sinks] == alone
            assert recorder.restarts[-1][1] > 0, "streams were to be open"
            assert not list(read_deaths(front._address.deaths).values())[-1].of_itself, "no stream is to blame"
            (rank,) = workers(join)
        eventually(lambda: workers(join) not in ([], [rank]), "it dials in again for the next core")
        (rank,) = workers(join)
    assert not psutil.pid_exists(rank.pid)


def test_a_stage_of_two_ranks_on_another_machine_serves_what_one_serves(
    engine: Path, alone: list[tuple[int, ...]]
) -> None:
    """Ranks that the core starts and ranks that dial in: one met the others by another address, or was told another's
    task."""
    port = free_port()
    config = config_of(port, tensor_parallel=2, pipeline_parallel=2)
    with joining(engine, f"127.0.0.2:{port}", ranks=2):
        loaded = load_engine(engine, config)
        served = serve_on(loaded, config.scheduler, requests())
        loaded.runner.close()
    assert [tuple(served.ids[index]) for index in range(NUM_STREAMS)] == alone
    assert not any(name.endswith("_SOCKET_IFNAME") for name in os.environ), "what this starts next has another way"


def test_a_machine_that_vanishes_is_waited_for_and_then_given_up(
    engine: Path, alone: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage on a machine of its own, whose network goes without a word: streams hung for ever, on both machines."""
    wait_s = 60.0  # and little where it is to be over

    def core_of_now(python: str, spec: CoreSpec, *arguments: Any) -> Sequence[str]:
        config = replace(spec.config, rank_wait_s=wait_s)
        return core_command(python, msgspec.structs.replace(spec, config=config), *arguments)

    monkeypatch.setattr(local, "core_command", core_of_now)
    port, recorder = free_port(), Recorder()
    with network() as (leader, other), ExitStack() as leaving:
        with other.entered():
            leaving.enter_context(joining(engine, f"{leader.address}:{port}"))
        with leader.entered(), started(engine, config_of(port, pipeline_parallel=2), recorder) as front:
            sinks = streams(front)
            sinks[0].wait(lambda: sinks[0].num_ids > 6)
            other.ip("link set eth0 down")
            eventually(lambda: status(front).state == "restarting", "it is missed")
            assert not sinks[0].finals
            other.ip("link set eth0 up")
            assert [sink.wait().ids() for sink in sinks] == alone
            sinks = streams(front)
            sinks[0].wait(lambda: sinks[0].num_ids > 6)
            wait_s = 1.0
            other.ip("link set eth0 down")
            for sink in sinks:
                error = sink.wait().finals[0].error
                assert isinstance(error, EngineLost)
                assert "rank 1 did not dial in to port" in str(error) and "within rank_wait_s=1" in str(error)
            with pytest.raises(EngineLost, match="rank 1 did not dial in"):
                streams(front)


def test_a_local_rank_that_dies_while_others_are_waited_for_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The core waited five minutes for a machine, and said nothing of its own rank that had died at once."""
    config = config_of(free_port(), tensor_parallel=4)
    progress: list[str] = []

    def kill(words: str) -> None:
        progress.append(words)
        (child,) = psutil.Process().children()
        child.kill()

    launcher = ExternalLauncher(config, kill)
    try:
        with pytest.raises(RankLost, match=r"^rank 1 died \(signal 9\)$"):
            launcher.start([Place(rank=rank, tensor_parallel=4) for rank in (1, 2, 3)])
    finally:
        launcher.close()
    assert progress == ["waiting for ranks 2-3 of node 1 to dial in"]


def test_only_what_node_says_keeps_the_leader_from_starting_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A LOCAL_WORLD_SIZE of another program, in the environment, was taken for torchrun's: the core waited for ranks of
    its own machine, or ended with a ValueError."""
    for size, said, missing in (("2", "", "2-3 of node 1"), ("many", "0", "2-3 of node 1"), ("2", "1", "1-3 of")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", size)
        monkeypatch.setenv(EVERY_RANK_JOINS, said)
        told: list[str] = []
        launcher = ExternalLauncher(config_of(free_port(), tensor_parallel=4, wait_s=0.01), told.append)
        with pytest.raises(RanksMissing):
            launcher.start([Place(rank=rank, tensor_parallel=4) for rank in (1, 2, 3)])
        launcher.close()
        assert f"waiting for ranks {missing}" in told[0]
