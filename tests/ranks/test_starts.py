"""Ranks that start: what is missing on one machine, or hangs there, is an error with its name and no wait for ever."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engines import make_checkpoint, make_engine
from joined import config_of
from msgspec import structs

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig
from pageflight.core.errors import ConfigError, PageflightError, RankLost
from pageflight.core.manifest import manifest_digest
from pageflight.core.plan import StepPlan, StepResult
from pageflight.kv import capacity
from pageflight.kv.capacity import FreeMemory
from pageflight.models.stages import Place
from pageflight.ranks import process_group, processes
from pageflight.ranks.launcher import Ended
from pageflight.ranks.local_launcher import LocalLauncher, LocalRank
from pageflight.ranks.messages import Failed, RankSpec, encode
from pageflight.ranks.plan_frames import PlanEncoder
from pageflight.ranks.processes import RankProcesses
from pageflight.runners import parallel
from pageflight.runners.host import capacity_on_host
from pageflight.runners.parallel import load_parallel
from pageflight.runners.rank_worker import work

TWO = Place(rank=0, tensor_parallel=2)
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("starts")
    make_checkpoint(folder / "checkpoint")
    return make_engine(folder / "checkpoint", folder / "engine", "torch")


def spec_of(engine: Path, device: str = "cpu") -> RankSpec:
    return RankSpec(
        engine_dir=str(engine),
        manifest_digest=manifest_digest(engine),
        config=config_of(1, tensor_parallel=2),
        place=Place(rank=1, tensor_parallel=2),
        device=device,
        host="127.0.0.1",
        port=1,
        num_threads=1,
        num_instances=1,
    )


def not_present() -> None:
    raise AssertionError("the others would have waited for this rank")


def test_a_machine_whose_gpu_is_not_seen_says_so_before_it_is_waited_for(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One met by gloo and the other by NCCL, for half an hour, without a word."""
    here = f"rank 1 on {socket.gethostname()}"
    with pytest.raises(ConfigError, match=f"{here}: torch sees no GPU there, and the first rank computes on one"):
        parallel.join(spec_of(engine, "cuda"), 0, not_present)
    monkeypatch.setattr(parallel, "_device", lambda place, index: torch.device("cuda", index))
    with pytest.raises(ConfigError, match=f"{here}: the first rank sees no GPU and computes on a processor"):
        parallel.join(spec_of(engine, "cpu"), 0, not_present)


class StoppedLauncher(LocalLauncher):
    """Whose ranks stop as they start."""

    def start(self, places: Sequence[Place]) -> Sequence[LocalRank]:
        started = super().start(places)
        for rank in started:
            os.kill(rank._process.pid, signal.SIGSTOP)
        return started


def test_a_rank_that_hangs_before_it_is_there_is_named(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start was given up after half an hour, and nobody knew whose fault it was."""
    monkeypatch.setattr(processes, "PRESENT_S", 0.5)
    monkeypatch.setattr(parallel, "open_launcher", lambda config, progress: StoppedLauncher())
    with pytest.raises(RankLost, match=r"rank 1 has not said within 0\.5 s that it is there"):
        load_parallel(engine, EngineConfig(tensor_parallel=2), num_threads=1, num_instances=1)


LEADER = """
import os, signal, sys
from pathlib import Path
from pageflight.core.config import EngineConfig
from pageflight.ranks import processes
from pageflight.runners.parallel import load_parallel

processes.MEET_S = 1.0
wait_present = processes.RankProcesses.wait_present

def then_stop(ranks):
    wait_present(ranks)
    os.kill(ranks._ranks[0]._process.pid, signal.SIGSTOP)

def lost(error):
    print(type(error).__name__, error.return_code, error, flush=True)
    os._exit(3)

processes.RankProcesses.wait_present = then_stop
load_parallel(Path(sys.argv[1]), EngineConfig(tensor_parallel=2), num_threads=1, num_instances=1, on_loss=lost)
"""


def test_a_rank_that_hangs_before_the_others_have_met_it_ends_the_start(engine: Path) -> None:
    """The first rank waited for half an hour in a call that nothing interrupts."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", LEADER, str(engine)]
    leader = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert leader.returncode == 3, leader.stderr
    assert leader.stdout.startswith(f"RankLost {KILLED} the ranks have not met within 1 s, though all were there")


class Told:
    """A rank whose end the test tells."""

    def __init__(self, rank: int) -> None:
        self.rank, self.name = rank, f"rank {rank}"
        self.line, self.theirs = Pipe()
        self._ended: queue.Queue[Ended] = queue.Queue()

    line: Connection

    def end(self, code: int, error: str = "") -> None:
        if error:
            self.theirs.send_bytes(encode(Failed(error, "words")))
        self._ended.put(Ended(words=f"code {code}", return_code=code))

    def wait(self, timeout_s: float | None = None) -> Ended | None:
        ended = self._ended.get(timeout=timeout_s)
        self._ended.put(ended)
        return ended

    def kill(self) -> None:
        self.end(KILLED)

    def hang_up(self) -> None:
        self.line.close()


@pytest.mark.parametrize(
    ("first", "then", "told"),
    [
        ((-signal.SIGABRT, ""), (KILLED, ""), KILLED),  # NCCL aborts where a machine is lost
        ((1, "RuntimeError"), (KILLED, ""), KILLED),  # gloo's sum fails there
        ((-signal.SIGABRT, ""), None, -signal.SIGABRT),
        ((1, "ConfigError"), (KILLED, ""), None),
    ],
)
def test_what_follows_from_a_lost_machine_is_not_told_in_its_place(
    first: tuple[int, str], then: tuple[int, str] | None, told: int | None
) -> None:
    """A rank that fails because another is lost was a crash, which speaks against every stream of the step."""
    each, heard = [Told(1), Told(2)], queue.Queue[PageflightError]()
    launcher = SimpleNamespace(start=lambda places: each, close=lambda: None)
    ranks = RankProcesses(launcher, [], heard.put)  # type: ignore[arg-type]
    each[0].end(*first)
    if then is not None:
        threading.Timer(0.05, each[1].end, then).start()
    loss = heard.get(timeout=60)
    assert getattr(loss, "return_code", None) == told and ranks.loss() is loss
    ranks.dismiss(at_once=True)
    ranks.close()


class OneStep:
    """A runner that tells whether it was closed."""

    limits = SimpleNamespace(max_in_flight=1)

    def __init__(self, told: list[str]) -> None:
        self._told, self._step = told, 0

    def submit(self, plan: StepPlan) -> None:
        self._step = plan.step

    def collect(self) -> StepResult:
        return StepResult(self._step, np.zeros(0, np.int32))

    def close(self) -> None:
        self._told.append("runner")


def test_a_rank_closes_in_order_though_nobody_has_read_what_it_said(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank reads results of others when it has its own, so it mostly closes with some unread: caches were not
    saved, groups not left."""
    told: list[str] = []
    communicator = SimpleNamespace(close=lambda: told.append("communicator"))

    def join(*arguments: Any, **options: Any) -> tuple[OneStep, Any]:
        return OneStep(told), communicator

    monkeypatch.setattr(parallel, "join", join)
    ours, theirs = Pipe()
    ours.send_bytes(encode(spec_of(engine)))
    none = np.zeros(0, np.int32)
    plan = StepPlan(step=0, rows=none, starts_at=none, lengths=none, samples=np.zeros(0, np.bool_))
    ours.send_bytes(PlanEncoder().message(plan))
    thread = threading.Thread(target=work, args=(theirs, 0))
    thread.start()
    assert ours.poll(60)
    ours.close()
    thread.join(60)
    assert told == ["runner", "communicator"]


def test_torch_does_not_abort_a_process_that_has_lost_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun has it do: a lost machine was a crash of the core, before anybody could say what was lost."""
    seen: dict[str, str] = {}
    for name in ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING"):
        monkeypatch.setenv(name, "1")
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "lo")
    monkeypatch.setattr(process_group.dist, "init_process_group", lambda *_, **__: seen.update(os.environ))
    store = process_group.dist.HashStore()
    process_group.GroupCommunicator(Place(rank=0), store, torch.device("cuda", 0), "127.0.0.1")
    assert seen["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == seen["TORCH_NCCL_ENABLE_MONITORING"] == "0"


class Alike:
    """A communicator of ranks that all have what this one has."""

    def __init__(self, place: Place, num_nodes: int) -> None:
        self.place = place
        self._per_node = place.num_ranks // num_nodes

    def total(self, number: int) -> int:
        return BLOCK_BYTES * self._per_node

    def least(self, number: int) -> int:
        return number


GIB = 1 << 30
BLOCK_BYTES = 1 << 20


@pytest.mark.parametrize(("num_nodes", "share"), [(2, 32), (1, 16)])
def test_a_machine_has_memory_for_its_own_ranks(
    engine: Path, monkeypatch: pytest.MonkeyPatch, num_nodes: int, share: int
) -> None:
    """What ranks of all machines hold was to fit into each one's memory: two machines used half of what they had."""
    monkeypatch.setattr(capacity, "free_memory", lambda: FreeMemory(num_bytes=64 * GIB, source="a test"))
    model = SimpleNamespace(block_size=32, kv_bytes_per_block=BLOCK_BYTES)
    manifest = SimpleNamespace(max_model_len=1 << 20)
    scheduler = SchedulerConfig(max_model_len=1 << 16, max_num_seqs=512)

    def found(kv: KVConfig) -> capacity.Capacity:
        config = EngineConfig(kv=kv, scheduler=scheduler, tensor_parallel=2, num_nodes=num_nodes)
        return capacity_on_host(model, manifest, config, 1, Alike(TWO, num_nodes))  # type: ignore[arg-type]

    computed = found(KVConfig())
    assert computed.kv.num_blocks * BLOCK_BYTES == share * GIB
    assert computed.num_bytes == 2 * share * GIB
    if num_nodes == 2:
        asked = found(KVConfig(memory_bytes=80 * GIB, host_memory_bytes=40 * GIB))
        assert (asked.kv.num_blocks * BLOCK_BYTES, asked.kv.num_host_blocks * BLOCK_BYTES) == (40 * GIB, 20 * GIB)
    with pytest.raises(ConfigError, match="bytes of blocks" if num_nodes == 2 else "kv_memory="):
        found(KVConfig(memory_bytes=80 * GIB, host_memory_bytes=60 * GIB))


def test_an_instance_has_all_of_the_gpus_that_ray_gives_it(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of four took a quarter of GPUs that no other had. On processors they do share a machine."""

    class Stop(Exception): ...

    def tell(self: RankProcesses, specs: Sequence[RankSpec]) -> None:
        raise Stop(*{spec.num_instances for spec in specs})

    launcher = SimpleNamespace(
        start=lambda places: [Told(place.rank) for place in places],
        close=lambda: None,
        host="127.0.0.1",
        device_index=0,
    )
    monkeypatch.setattr(parallel, "open_launcher", lambda config, progress: launcher)
    monkeypatch.setattr(RankProcesses, "tell", tell)
    config = EngineConfig(tensor_parallel=2, launcher="ray", num_nodes=2)
    for device, expected in (("cpu", 4), ("cuda", 1)):
        monkeypatch.setattr(parallel, "_device", lambda *_, kind=device: torch.device(kind))
        with pytest.raises(Stop) as caught:
            load_parallel(engine, config, num_threads=1, num_instances=4)
        assert caught.value.args == (expected,)


def test_machines_that_share_cores_divide_them(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines that were tried on one computed with all of its cores each, and kept each other waiting: a step took
    six times as long."""
    given: list[int] = []

    def load_rank(lowering: object, folder: Path, communicator: object, *, num_threads: int) -> None:
        given.append(num_threads)
        raise ConfigError("that was all")

    monkeypatch.setattr(parallel.TorchLowering, "load_rank", load_rank)
    for num_here in (1, 2, 16):
        communicator: Any = SimpleNamespace(num_here=num_here)
        with pytest.raises(ConfigError, match="that was all"):
            parallel._load(structs.replace(spec_of(engine), num_threads=8), communicator, torch.device("cpu"))
    assert given == [8, 4, 1]


def test_ranks_of_one_machine_know_that_they_share_its_cores(engine: Path) -> None:
    """As above: nobody else counts them, for machines are told apart by number."""
    config = replace(config_of(1, tensor_parallel=2), launcher="local", num_nodes=1)
    runner, _ = load_parallel(engine, config, num_threads=2, num_instances=1)
    try:
        assert runner._communicator.num_here == 2
    finally:
        runner.close()
