"""Ranks of another machine: they dial in, work, vanish and come back, and clients notice the time it takes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from engines import make_checkpoint, make_engine, serve, serve_on
from front_harness import Collector, NumberText, Recorder, eventually, generation
from joined import config_of, free_port, joining, network, workers

from pageflight.core.config import EngineConfig
from pageflight.core.errors import EngineLost
from pageflight.core.request import Request, SamplingParams
from pageflight.loop.core_process import CoreSpec
from pageflight.loop.deaths import read_deaths
from pageflight.loop.front import Front
from pageflight.loop.local import start_core
from pageflight.loop.status import CoreStatus, read_status
from pageflight.loop.supervisor import SupervisorConfig
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


def test_a_machine_that_vanishes_is_waited_for_and_then_given_up(engine: Path, alone: list[tuple[int, ...]]) -> None:
    """A stage on a machine of its own, whose network goes without a word: streams hung for ever, on both machines."""
    with network() as machine:
        if machine is None:
            pytest.skip("network namespaces need root and `ip`")
        port, recorder = free_port(), Recorder()
        config = config_of(port, pipeline_parallel=2, wait_s=5.0)
        with (
            joining(engine, f"{machine.address}:{port}", within=machine.within),
            started(engine, config, recorder) as front,
        ):
            assert [sink.wait().ids() for sink in streams(front)] == alone
            sinks = streams(front)
            sinks[0].wait(lambda: sinks[0].num_ids > 6)
            machine.link("down")
            eventually(lambda: status(front).state == "restarting", "it is missed")
            assert not sinks[0].finals
            machine.link("up")
            assert [sink.wait().ids() for sink in sinks] == alone
            sinks = streams(front)
            sinks[0].wait(lambda: sinks[0].num_ids > 6)
            machine.link("down")
            for sink in sinks:
                error = sink.wait().finals[0].error
                assert isinstance(error, EngineLost)
                assert "rank 1 did not dial in to port" in str(error) and "within rank_wait_s=5" in str(error)
            with pytest.raises(EngineLost, match="rank 1 did not dial in"):
                streams(front)
