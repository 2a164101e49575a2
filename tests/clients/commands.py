"""`pageflight serve` as people run it: a process of its own, with the real server below."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import requests
from servers import Server, free_ports, wait_for

from pageflight.backend.ledger import Page, pages
from pageflight.loop.address import stub_folder


@dataclass(frozen=True)
class Served(Server):
    """A server under `pageflight serve`, and what that has printed."""

    process: subprocess.Popen[str]
    printed: list[str] = field(default_factory=list)

    @property
    def server_pid(self) -> int:
        (tritonserver,) = psutil.Process(self.process.pid).children()
        return tritonserver.pid

    @property
    def stubs(self) -> list[Page]:
        return [page for page in pages(stub_folder(self.server_pid)) if page.owner.is_alive]

    def stub(self, model: str) -> Page:
        (found,) = [page for page in self.stubs if page.owner.model == model]
        return found

    def kill(self, model: str, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.stub(model).owner.stub_pid, number)

    def has_printed(self, text: str) -> bool:
        return any(text in line for line in self.printed)

    def answers(self, model: str) -> bool:
        """Whether a new request succeeds."""
        try:
            return self.generate(model, text_input="the fox", max_tokens=2).status_code == 200
        except requests.RequestException:
            return False


@contextmanager
def serving(folder: Path, name: str, vocab_size: int, *options: str) -> Iterator[Served]:
    """A server that is ready; afterwards it must end with status 0, unless it has been ended before."""
    ports = free_ports()
    command = [sys.executable, "-c", "import sys; from pageflight.cli.main import main; sys.exit(main())", "serve"]
    command += [str(folder), "--host", "127.0.0.1", "--http-port", str(ports.http), "--grpc-port", str(ports.grpc)]
    command += ["--metrics-port", str(ports.metrics), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        server = Served(name, vocab_size, ports, process)
        assert process.stdout is not None
        reader = threading.Thread(target=lambda: server.printed.extend(process.stdout or ()), daemon=True)
        reader.start()
        try:
            assert wait_for(lambda: server.has_printed("Serving"), 60), "".join(server.printed)
            yield server
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                assert process.wait(timeout=60) == 0, "".join(server.printed)
        finally:
            process.kill()
            reader.join()
