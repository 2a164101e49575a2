"""Machines for tests: a core on this one, and `pageflight join` as another, beside it or in a network of its own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
from ray_cluster import Machine, why_not_isolated

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig

PAGEFLIGHT = "import sys; from pageflight.cli.main import main; sys.exit(main())"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def config_of(port: int, *, tensor_parallel: int = 1, pipeline_parallel: int = 1, wait_s: float = 60.0) -> EngineConfig:
    return EngineConfig(
        kv=KVConfig(num_blocks=64),
        scheduler=SchedulerConfig(max_num_tokens=64, max_num_seqs=8, max_model_len=160),
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        num_threads=1,
        launcher="external",
        num_nodes=2,
        rank_port=port,
        rank_wait_s=wait_s,
    )


@contextmanager
def joining(engine: Path, leader: str, *, ranks: int = 1) -> Iterator[psutil.Process]:
    """The second machine."""
    command = [sys.executable, "-c", PAGEFLIGHT, "join", str(engine), f"--leader={leader}"]
    command += ["--node-rank=1", f"--ranks-per-node={ranks}", "--leader-timeout-s=60"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    try:
        yield psutil.Process(process.pid)
        assert process.poll() is None, "it stays until it is ended"
        process.terminate()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


def workers(join: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in join.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "rank_worker" in " ".join(child.cmdline()):
                found.append(child)
    return found


@contextmanager
def network() -> Iterator[tuple[Machine, Machine]]:
    """Two machines, of which nobody outside knows; skips the test where this process may not make them."""
    if why_not := why_not_isolated():
        pytest.skip(f"machines with networks of their own: {why_not}")
    with ExitStack() as closing:
        switch = Machine(0, is_isolated=True)
        closing.callback(switch.close)
        machines = []
        for number in (1, 2):
            machines.append(Machine(number, switch, is_isolated=True))
            closing.callback(machines[-1].close)
        yield machines[0], machines[1]
