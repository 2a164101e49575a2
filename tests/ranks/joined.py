"""Machines for tests: a core on this one, and `pageflight join` as another, beside it or in a network of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

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
def joining(engine: Path, leader: str, *, within: Sequence[str] = (), ranks: int = 1) -> Iterator[psutil.Process]:
    """The second machine. `within`: command that runs another in its network."""
    command = [*within, sys.executable, "-c", PAGEFLIGHT, "join", str(engine), f"--leader={leader}"]
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


@dataclass(frozen=True)
class Network:
    """Another machine's: `address` is ours as it sees it."""

    name: str
    address: str

    @property
    def within(self) -> tuple[str, ...]:
        return "ip", "netns", "exec", self.name

    def link(self, state: str) -> None:
        """ "down": the machine has vanished, without a word."""
        run("ip", "-n", self.name, "link", "set", f"{self.name}b", state)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def network() -> Iterator[Network | None]:
    """A network namespace with a line to this one; None where this process may not make one."""
    number = os.getpid() % 65536
    name, subnet = f"pf{number}", f"10.{203 + number % 4}.{number // 256}"
    ours, theirs = f"{subnet}.1", f"{subnet}.2"
    made = (
        shutil.which("ip") is not None
        and not subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode
    )
    if not made:
        yield None
        return
    try:
        run("ip", "link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b", "netns", name)
        run("ip", "addr", "add", f"{ours}/24", "dev", f"{name}a")
        run("ip", "link", "set", f"{name}a", "up")
        run("ip", "-n", name, "addr", "add", f"{theirs}/24", "dev", f"{name}b")
        run("ip", "-n", name, "link", "set", f"{name}b", "up")
        run("ip", "-n", name, "link", "set", "lo", "up")
        yield Network(name, ours)
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            run("ip", "netns", "del", name)
