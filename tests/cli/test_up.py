"""The first minute: `pageflight up` with the demo checkpoint and the real tritonserver, as scripts/serve runs it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pageflight.cli.chat import Conversation
from pageflight.cli.client import Server
from pageflight.cli.inspect_repository import engine_named
from pageflight.cli.local import local_engine
from pageflight.cli.up import DEMO_NAME, DEMO_PROMPT

from .test_server import free_ports


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("repositories")


@pytest.fixture(scope="module")
def first_minute(repositories: Path) -> Iterator[tuple[Server, str]]:
    """A server after its first completion, and everything printed until then."""
    ports = free_ports()
    command = [sys.executable, "-c", "import sys; from pageflight.cli.main import main; sys.exit(main())", "up"]
    command += ["--http-port", str(ports.http), "--grpc-port", str(ports.grpc), "--metrics-port", str(ports.metrics)]
    environment = {**os.environ, "PAGEFLIGHT_REPOSITORIES": str(repositories), "COLUMNS": "200"}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        shown = []
        for line in process.stdout:
            shown.append(line)
            if "Ctrl-C ends the server" in line:
                break
        yield Server(url=f"http://localhost:{ports.http}"), "".join(shown)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 0, rest
        assert "draining" in rest


def test_the_first_minute_shows_a_completion_and_how_to_ask(first_minute: tuple[Server, str]) -> None:
    """It printed READY and left the rest to the reader."""
    _, shown = first_minute
    assert DEMO_PROMPT in shown and "first token" in shown
    assert re.search(r"^  curl .*/v2/models/demo/generate_stream ", shown, re.MULTILINE)
    assert re.search(r"^  python3 -c ", shown, re.MULTILINE) and " generate " in shown


def test_the_printed_commands_work(first_minute: tuple[Server, str]) -> None:
    """The example of the first minute had a quote too many."""
    server, shown = first_minute
    curl, python = (line.strip() for line in shown.splitlines() if line.startswith(("  curl", "  python3")))
    streamed = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True).stdout
    assert streamed.count("data:") > 1 and "text_output" in streamed
    once = subprocess.run(["bash", "-c", python], capture_output=True, text=True, check=True).stdout
    answers = server.stream(DEMO_NAME, {"text_input": DEMO_PROMPT.partition("\n")[0], "max_tokens": 32})
    assert once.rstrip("\n") == "".join(answer["text_output"] for answer in answers).rstrip("\n")


def test_local_gives_what_the_server_gives(first_minute: tuple[Server, str], repositories: Path) -> None:
    """Two ways to the same engine had two ideas of the defaults."""
    server, _ = first_minute
    request = {"text_input": DEMO_PROMPT, "max_tokens": 20, "temperature": 0.8, "seed": 11}
    served = "".join(answer["text_output"] for answer in server.stream("ensemble", request))
    with local_engine(repositories / DEMO_NAME) as engine:
        assert "".join(answer["text_output"] for answer in engine.stream("", request)) == served


def test_chat_remembers_until_it_is_reset(first_minute: tuple[Server, str], repositories: Path) -> None:
    """The second question was asked without the first."""
    conversation = Conversation(engine_named(repositories / DEMO_NAME, None), "Be brief.")
    first = conversation.ask("Write a function.")
    conversation.answered("def f(): pass")
    second = conversation.ask("Shorter.")
    assert "Write a function." in first and "Be brief." in first
    assert "def f(): pass" in second and second.endswith(first[-5:])
    conversation.reset()
    assert conversation.ask("Write a function.") == first
