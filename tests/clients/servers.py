"""Real servers for tests: a repository, a free set of ports, tritonserver in between."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests

from pageflight.cli.errors import ServerCrash
from pageflight.cli.serve import STARTS
from pageflight.cli.server_process import Ports, ServerProcess
from pageflight.cli.tritonserver import ServerCommand, server_command
from pageflight.loop.watch import Watch


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    """Whether `condition` came true in time."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


@dataclass(frozen=True)
class Server:
    """A running server and the name of its text model."""

    name: str
    vocab_size: int
    ports: Ports
    process: ServerProcess

    @property
    def grpc(self) -> str:
        return f"localhost:{self.ports.grpc}"

    @property
    def http(self) -> str:
        return f"localhost:{self.ports.http}"

    def url(self, model: str, what: str) -> str:
        return f"http://{self.http}/v2/models/{model}/{what}"

    def generate(self, model: str | None = None, **body: object) -> requests.Response:
        return requests.post(self.url(model or self.name, "generate"), json=body, timeout=30)

    def text(self, model: str | None = None, **body: object) -> str:
        response = self.generate(model, **body)
        assert response.status_code == 200, response.text
        return response.json()["text_output"]

    def metrics(self) -> dict[str, float]:
        """Every series of ours and TensorRT-LLM's by its text on /metrics."""
        text = requests.get(f"http://localhost:{self.ports.metrics}/metrics", timeout=10).text
        found = re.findall(r"^((?:nv_trt_llm|nv_llm|pageflight)\S+) (\S+)$", text, re.MULTILINE)
        return {series: float(value) for series, value in found}


@contextmanager
def running_server(
    repository: Path,
    name: str,
    vocab_size: int,
    further: Sequence[str] = (),
    watch: Watch | None = None,
    exit_timeout_s: int = 5,
) -> Iterator[Server]:
    ports = free_ports()
    command = server_command(
        repository,
        http_port=ports.http,
        grpc_port=ports.grpc,
        metrics_port=ports.metrics,
        host="127.0.0.1",
        exit_timeout_s=exit_timeout_s,
        further=further,
    ).with_environment((watch or Watch()).to_environment())
    process = _started(command, ports)
    try:
        yield Server(name=name, vocab_size=vocab_size, ports=ports, process=process)
        process.drain(10.0, lambda text: None)
    finally:
        process.kill()
        process.wait()


def _started(command: ServerCommand, ports: Ports) -> ServerProcess:
    """A ready server; tried again, as `pageflight serve` does, when Triton loses the race for its shared memory."""
    for attempt in range(1, STARTS + 1):
        process = ServerProcess(command.arguments, command.environment, ports, verbose=False)
        try:
            process.wait_ready(lambda text: None)
        except BaseException as error:
            process.kill()
            process.wait()
            if attempt == STARTS or not isinstance(error, ServerCrash):
                raise
        else:
            return process
    raise AssertionError("the last attempt returns or raises")


def free_ports() -> Ports:
    sockets = [socket.socket() for _ in range(3)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    http, grpc, metrics = (each.getsockname()[1] for each in sockets)
    for each in sockets:
        each.close()
    return Ports(host="127.0.0.1", http=http, grpc=grpc, metrics=metrics)
