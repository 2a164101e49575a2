"""The engines of a comparison, each behind the same three verbs: start, measure, stop."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from perf import figures, load
from perf.peers import openai_load
from perf.wire import Model
from perf.workload import Kind, Workload

ROOT = Path(__file__).resolve().parent.parent
START_S = 600.0
STOP_S = 60.0
ALL_KINDS = frozenset(Kind)


class SideError(Exception):
    """An engine did not start, or its driver ended with an error; the message says where its log is."""


class Side(Protocol):
    """One engine with one model in one precision."""

    label: str
    weights: str  # bf16 or int8: which ceiling applies, and who competes with whom
    is_ours: bool
    is_served: bool  # over the network, or in process
    kinds: frozenset[Kind]

    def start(self) -> None: ...

    def measure(self, workload: Workload, seed: int) -> figures.Record: ...

    def stop(self) -> None: ...


def free_port() -> int:
    """A TCP port that nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Child:
    """A process in a group of its own, ended with everything it started; its output is in a log file or on a pipe."""

    def __init__(
        self, command: Sequence[str], log: Path, *, environment: Mapping[str, str] | None = None, piped: bool = False
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self._log_file = log.open("wb")
        self.process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
            stdout=subprocess.PIPE if piped else self._log_file,
            stderr=self._log_file,
            env={**os.environ, **(environment or {})},
            cwd=ROOT,
            start_new_session=True,
        )

    @property
    def stdin(self) -> IO[bytes]:
        assert self.process.stdin is not None, "the child has no pipe"
        return self.process.stdin

    def read_record(self) -> figures.Record:
        """The next line of JSON that it prints. Raises SideError when it ends instead."""
        assert self.process.stdout is not None, "the child has no pipe"
        for line in self.process.stdout:
            if line.startswith(b"{"):
                record: figures.Record = json.loads(line)
                return record
        raise SideError(f"it ended with status {self.process.wait()}; log: {self.log}")

    def check_alive(self) -> None:
        """Raises SideError with the log's place when it has ended."""
        if self.process.poll() is not None:
            raise SideError(f"it ended with status {self.process.returncode}; log: {self.log}")

    def stop(self) -> None:
        """Asks the group to end, and kills it after a while."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is not None:
                break
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
        self._log_file.close()


@dataclass(slots=True)
class TritonSide:
    """This project through Triton: `pageflight build`, `pageflight serve`, gRPC streaming."""

    label: str
    weights: str
    checkpoint: Path
    repository: Path
    kv_gib: int
    vocab_size: int
    is_ours: bool = True
    is_served: bool = True
    kinds: frozenset[Kind] = ALL_KINDS
    _child: Child | None = None
    _address: str = ""
    _model: Model | None = None

    def start(self) -> None:
        build_repository(self.checkpoint, self.repository, self.weights, self.kv_gib)
        log = self.repository.with_name(f"{self.label}.log")
        self._child, self._address = start_triton([*pageflight_command(), "serve", str(self.repository)], log)
        self._model = load.find_model(self._address, "engine", tokenizer="", timeout_s=START_S)

    def measure(self, workload: Workload, seed: int) -> figures.Record:
        assert self._model is not None, "start() comes first"
        return load.run(self._address, self._model, workload, vocab_size=self.vocab_size, seed=seed, tokenizer="")

    def stop(self) -> None:
        if self._child is not None:
            self._child.stop()


@dataclass(slots=True)
class EngineSide:
    """This project's engine without Triton, in one process: started anew for every run."""

    label: str
    weights: str
    checkpoint: Path
    repository: Path
    kv_gib: int
    is_ours: bool = True
    is_served: bool = False
    kinds: frozenset[Kind] = ALL_KINDS

    def start(self) -> None:
        build_repository(self.checkpoint, self.repository, self.weights, self.kv_gib)

    def measure(self, workload: Workload, seed: int) -> figures.Record:
        command = [sys.executable, str(ROOT / "perf" / "engine_alone.py"), "--engine", str(self.repository)]
        command += ["--plan", str(workload), "--seed", str(seed), "--kv-memory", str(self.kv_gib << 30)]
        child = Child(command, self.repository.with_name(f"{self.label}.log"), piped=True)
        try:
            record = child.read_record()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(STOP_S)
        finally:
            child.stop()
        return record

    def stop(self) -> None:
        """Nothing runs between measurements."""


@dataclass(slots=True)
class VllmSide:
    """vLLM's OpenAI server on CPU."""

    label: str
    weights: str
    peers_dir: Path
    model: str
    kv_gib: int
    vocab_size: int
    is_ours: bool = False
    is_served: bool = True
    kinds: frozenset[Kind] = ALL_KINDS
    _child: Child | None = None
    _base: str = ""

    def start(self) -> None:
        port = free_port()
        self._base = f"http://127.0.0.1:{port}"
        libraries = [
            path
            for pattern in ("lib/tc/usr/lib/*/libtcmalloc_minimal.so.4", "lib/libiomp5.so")
            for path in map(str, sorted(self.peers_dir.glob(pattern)))
        ]
        environment = {
            "LD_PRELOAD": ":".join(libraries),
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_gib),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
        }
        python = self.peers_dir / "v-vllm" / "bin" / "python"
        command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--model", str(self.peers_dir / "models" / self.model), "--served-model-name", self.model]
        command += ["--dtype", "bfloat16", "--max-model-len", "2048"]
        command += ["--disable-uvicorn-access-log", "--no-enable-log-requests"]
        log = self.peers_dir / "logs" / f"{self.label}-{self.model}.log"
        self._child = Child(command, log, environment=environment)
        end_s = time.monotonic() + START_S
        while not is_healthy(f"{self._base}/health"):
            self._child.check_alive()
            if time.monotonic() > end_s:
                raise SideError(f"{self.label} is not ready after {START_S:.0f} s; log: {log}")
            time.sleep(0.5)

    def measure(self, workload: Workload, seed: int) -> figures.Record:
        return openai_load.run(self._base, self.model, workload, vocab_size=self.vocab_size, seed=seed)

    def stop(self) -> None:
        if self._child is not None:
            self._child.stop()


@dataclass(slots=True)
class GenaiSide:
    """OpenVINO GenAI in process; its prefix cache on where prompts share something."""

    label: str
    weights: str
    peers_dir: Path
    folder: str
    kv_gib: int
    prefix_cache: bool
    is_ours: bool = False
    is_served: bool = False
    kinds: frozenset[Kind] = ALL_KINDS
    _child: Child | None = None

    def start(self) -> None:
        python = self.peers_dir / "v-ov" / "bin" / "python"
        command = [str(python), "-m", "perf.peers.genai", "--ir", str(self.peers_dir / "ov" / self.folder)]
        arithmetic = "bf16" if _has_bf16() else "f32"  # as our engine computes; emulated bf16 crawls
        command += ["--precision", arithmetic, "--cache-gib", str(self.kv_gib)]
        command += ["--threads", str(len(os.sched_getaffinity(0)))]
        command += ["--prefix-cache"] if self.prefix_cache else []
        log = self.peers_dir / "logs" / f"{self.label}-{self.folder}.log"
        self._child = Child(command, log, environment={"PYTHONPATH": str(ROOT)}, piped=True)
        self._child.read_record()

    def measure(self, workload: Workload, seed: int) -> figures.Record:
        assert self._child is not None, "start() comes first"
        self._child.stdin.write(f"{workload} {seed}\n".encode())
        self._child.stdin.flush()
        return self._child.read_record()

    def stop(self) -> None:
        if self._child is not None:
            self._child.stdin.close()
            self._child.stop()


def pageflight_command() -> list[str]:
    """The console script beside the running interpreter."""
    return [str(Path(sys.executable).with_name("pageflight"))]


def start_triton(
    command: Sequence[str], log: Path, *, host_option: str = "--host", environment: Mapping[str, str] | None = None
) -> tuple[Child, str]:
    """Starts a server of Triton's protocol on free ports; its process and gRPC address once it is ready.

    Raises SideError when it ends, or is not ready in time.
    """
    ports = [free_port() for _ in range(3)]
    names = ("--http-port", "--grpc-port", "--metrics-port")
    options = [f"{name}={port}" for name, port in zip(names, ports, strict=True)]
    child = Child([*command, f"{host_option}=127.0.0.1", *options], log, environment=environment)
    end_s = time.monotonic() + START_S
    try:
        while not is_healthy(f"http://127.0.0.1:{ports[0]}/v2/health/ready"):
            child.check_alive()
            if time.monotonic() > end_s:
                raise SideError(f"not ready after {START_S:.0f} s; log: {log}")
            time.sleep(0.5)
    except BaseException:
        child.stop()
        raise
    return child, f"127.0.0.1:{ports[1]}"


def build_repository(checkpoint: Path, repository: Path, dtype: str, kv_gib: int) -> None:
    """Does nothing to one that is up to date. Raises SideError with the build's message."""
    command = [*pageflight_command(), "build", str(checkpoint), "--name", "bench", "--repository", str(repository)]
    command += ["--dtype", dtype, "--kv-memory", f"{kv_gib}GiB"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise SideError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")


def is_healthy(url: str) -> bool:
    """Does a server answer with 200 there?"""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _has_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)
