"""A core of several ranks is whole or gone: whatever becomes of one of its processes is a pause for clients."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import psutil
import pytest
from engines import make_checkpoint, make_engine
from front_harness import Collector, NumberText, Recorder, eventually, generation

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig
from pageflight.loop.core_process import CoreSpec
from pageflight.loop.deaths import read_deaths
from pageflight.loop.front import Front
from pageflight.loop.local import start_core
from pageflight.loop.status import CoreStatus, read_status
from pageflight.loop.supervisor import SupervisorConfig

NUM_STREAMS, NUM_TOKENS = 4, 60


@pytest.fixture(scope="module")
def spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CoreSpec:
    """Two ranks of every layer, or two stages of layers."""
    tensor_parallel, pipeline_parallel = {"ranks": (2, 1), "stages": (1, 2)}[request.param]
    folder = tmp_path_factory.mktemp("ranks")
    make_checkpoint(folder / "checkpoint")
    engine = make_engine(folder / "checkpoint", folder / "engine", "torch")
    config = EngineConfig(
        kv=KVConfig(num_blocks=64),
        scheduler=SchedulerConfig(max_num_tokens=64, max_num_seqs=8, max_model_len=160),
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
    )
    return CoreSpec(config=config, engine_dir=str(engine))


@pytest.fixture(scope="module")
def recorder(spec: CoreSpec) -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def front(spec: CoreSpec, recorder: Recorder) -> Iterator[Front]:
    patience = SupervisorConfig(hang_limit_s=4.0, backoff_s=0.01)
    with start_core(spec, NumberText(), recorder, supervision=patience) as front:
        yield front


def status(front: Front) -> CoreStatus:
    found = read_status(front._address.status)
    assert found is not None
    return found


def rank_pid(front: Front) -> int:
    """The process of the second rank."""
    (child,) = psutil.Process(status(front).core_pid).children()
    return child.pid


def streams(front: Front) -> list[Collector]:
    sinks = [Collector() for _ in range(NUM_STREAMS)]
    for index, sink in enumerate(sinks):
        front.submit(generation((index, 2, 3), max_tokens=NUM_TOKENS, temperature=1.0, seed=index), sink)
    return sinks


@pytest.fixture(scope="module")
def undisturbed(front: Front) -> list[tuple[int, ...]]:
    """Signals that a whole group of processes gets are none of a rank's business: its core decides."""
    rank = rank_pid(front)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(rank, number)
    answers = [sink.wait().ids() for sink in streams(front)]
    assert rank_pid(front) == rank
    return answers


@pytest.mark.parametrize(
    ("spec", "blow"),
    [
        ("ranks", "killed rank"),
        ("ranks", "stopped rank"),
        ("ranks", "killed core"),
        ("stages", "killed rank"),
        ("stages", "stopped rank"),
    ],
    indirect=["spec"],
)
def test_whatever_befalls_a_rank_is_a_pause_and_nothing_else(
    front: Front, recorder: Recorder, undisturbed: list[tuple[int, ...]], blow: str
) -> None:
    """The first rank waited for ever for the sum of one that was gone, or for ids of a stage that was, or streams went
    on with half a model; and ranks of a dead core kept its memory."""
    num_restarts = len(recorder.restarts)
    core, rank = status(front).core_pid, rank_pid(front)
    sinks = streams(front)
    sinks[0].wait(lambda: sinks[0].num_ids > 6)
    if blow == "killed core":
        os.kill(core, signal.SIGKILL)
    else:
        os.kill(rank, signal.SIGKILL if blow == "killed rank" else signal.SIGSTOP)
    eventually(lambda: len(recorder.restarts) > num_restarts, "another core takes over")
    assert [sink.wait().ids() for sink in sinks] == undisturbed
    assert recorder.restarts[-1][1] > 0, "streams were to be open"
    assert status(front).core_pid != core
    eventually(lambda: not psutil.pid_exists(rank), "no rank outlives its core")
    deaths = list(read_deaths(front._address.deaths).values())
    assert deaths[-1].of_itself == (blow == "stopped rank"), "who kills a rank need not be a stream"


@pytest.mark.parametrize("spec", ["ranks"], indirect=True)
def test_a_rank_that_dies_while_nothing_runs_is_noticed(front: Front, undisturbed: list[tuple[int, ...]]) -> None:
    """The next client paid for it: its first step failed, minutes later."""
    core = status(front).core_pid
    os.kill(rank_pid(front), signal.SIGKILL)
    eventually(lambda: status(front).core_pid not in (0, core) and status(front).state == "ready", "a new core")
    assert streams(front)[0].wait().ids() == undisturbed[0]
