"""The server that is soaked: built and started by the product's own commands, in a folder of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

HOST = "127.0.0.1"
_READY_S, _EXIT_S = 120.0, 90.0


class SoakError(Exception):
    """The soak cannot go on: the server does not start, or has gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What is built and how it is served; small, so that preemption and overflow happen."""

    checkpoint: Path
    name: str
    max_model_len: int
    kv_memory: str
    host_kv_memory: str
    max_num_seqs: int
    max_queue_size: int
    check_invariants: int
    deterministic: bool  # without it a near-tie may fall otherwise in other company, and texts cannot be compared
    further: tuple[str, ...] = ()  # options of `pageflight build`

    def build_arguments(self, repository: Path) -> list[str]:
        options = {
            "--repository": repository,
            "--name": self.name,
            "--dtype": "fp32",
            "--max-model-len": self.max_model_len,
            "--kv-memory": self.kv_memory,
            "--host-kv-memory": self.host_kv_memory,
            "--max-num-seqs": self.max_num_seqs,
            "--max-queue-size": self.max_queue_size,
        }
        flat = [str(part) for pair in options.items() for part in pair]
        deterministic = ["--deterministic"] if self.deterministic else []
        return ["build", str(self.checkpoint), *flat, *deterministic, *self.further]


@dataclass(slots=True)
class Running:
    """A server under `pageflight serve`, its log, and the folders it was given."""

    process: subprocess.Popen[str]
    http: int
    grpc: int
    metrics: int
    runtime: Path
    log: list[str] = field(default_factory=list)
    exit_status: int | None = None
    exit_s: float = 0.0

    @property
    def grpc_address(self) -> str:
        return f"{HOST}:{self.grpc}"

    def has_logged(self, pattern: str, since: int = 0) -> bool:
        return any(re.search(pattern, line) for line in self.log[since:])

    def series(self) -> dict[str, float]:
        """Every series of /metrics that is ours or TensorRT-LLM's, by its text. Empty while nobody answers."""
        with suppress(OSError), urllib.request.urlopen(f"http://{HOST}:{self.metrics}/metrics", timeout=5) as answer:
            text = answer.read().decode()
            found = re.findall(r"^((?:nv_trt_llm|pageflight)\S+) (\S+)$", text, re.MULTILINE)
            return {name: float(value) for name, value in found}
        return {}

    def versions(self) -> dict[str, str]:
        with urllib.request.urlopen(f"http://{HOST}:{self.http}/v2", timeout=5) as answer:
            return {"triton": str(json.load(answer)["version"])}

    def stop(self) -> None:
        """As a person would: SIGTERM, and patience."""
        begin_s = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.exit_status = self.process.wait(_EXIT_S)
        self.exit_s = time.monotonic() - begin_s


def command() -> list[str]:
    """The product's command line of this environment."""
    return [str(Path(sys.executable).with_name("pageflight"))]


def build(deployment: Deployment, repository: Path) -> None:
    done = subprocess.run(
        [*command(), *deployment.build_arguments(repository)], capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise SoakError(f"pageflight build failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


@contextmanager
def serving(repository: Path, folder: Path, log_file: Path, *, check_invariants: int) -> Iterator[Running]:
    """A ready server; killed at the end if it has not been stopped. Raises SoakError when it does not start."""
    http, grpc, metrics = _free_ports()
    runtime = folder / "run"
    runtime.mkdir(mode=0o700)
    arguments = [*command(), "serve", str(repository), "--host", HOST, "--check-invariants", str(check_invariants)]
    arguments += ["--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics), "--verbose"]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(runtime), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    ) as process:
        running = Running(process, http, grpc, metrics, runtime)
        reader = threading.Thread(target=_read, args=(running, log_file), name="server-log", daemon=True)
        reader.start()
        try:
            _wait_ready(running)
            yield running
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_EXIT_S)
            process.kill()
            reader.join(timeout=5)


def _read(running: Running, log_file: Path) -> None:
    assert running.process.stdout is not None
    with log_file.open("w", encoding="utf-8") as copy:
        for line in running.process.stdout:
            running.log.append(line.rstrip("\n"))
            copy.write(line)
            copy.flush()


def _wait_ready(running: Running) -> None:
    until_s = time.monotonic() + _READY_S
    while time.monotonic() < until_s and running.process.poll() is None:
        if running.has_logged(r"^Serving "):
            return
        time.sleep(0.1)
    raise SoakError("the server did not start:\n" + "\n".join(running.log[-20:]))


def _free_ports() -> tuple[int, int, int]:
    sockets = [socket.create_server((HOST, 0)) for _ in range(3)]
    http, grpc, metrics = (each.getsockname()[1] for each in sockets)
    for each in sockets:
        each.close()
    return http, grpc, metrics
