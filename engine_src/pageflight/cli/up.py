"""`pageflight up`: from a checkpoint to a served model with one completion as proof; what scripts/serve runs."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import pageflight_build
from pageflight.cli.build import run_build
from pageflight.cli.build_flags import BuildFlags
from pageflight.cli.client import Answer, Server
from pageflight.cli.console import console
from pageflight.cli.errors import CommandError
from pageflight.cli.flags import takes
from pageflight.cli.generate import print_answers
from pageflight.cli.serve import running_server, server_command, urls
from pageflight.cli.server_flags import ServerFlags

DEMO_NAME = "demo"
DEMO_PROMPT = "def read_file(path):\n    with open(path"
OWN_PROMPT = "Once upon a time"


@takes(BuildFlags, "build_flags")
@takes(ServerFlags, "server_flags")
def up(
    build_flags: BuildFlags,
    server_flags: ServerFlags,
    checkpoint: Annotated[
        str | None, typer.Option(help="Folder in Hugging Face format or hub id; the demo checkpoint by default.")
    ] = None,
    repository: Annotated[
        Path | None, typer.Option(help="Model repository to build and serve; by default repositories/NAME.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt of the first completion.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Length of the first completion.", min=1)] = 48,
    arguments: Annotated[
        list[str] | None, typer.Argument(help="After --: further arguments of tritonserver, as they are.")
    ] = None,
) -> None:
    """Build if needed, serve, show one completion and how to ask for more; until Ctrl-C.

    Examples:

        pageflight up
        pageflight up --checkpoint ./my-model --name mine --dtype int8 --http-port 9000
    """
    started = time.monotonic()
    if checkpoint is None:
        build_flags = replace(build_flags, name=build_flags.name or DEMO_NAME)
    result = run_build(build_flags, checkpoint or str(demo_checkpoint()), repository)
    command = server_command(result.repository, server_flags, arguments or ())
    with running_server(command, server_flags) as server:
        console.print(f"Serving {result.repository} on {urls(server_flags)}", highlight=False, soft_wrap=True)
        asked = prompt if prompt is not None else (OWN_PROMPT if checkpoint else DEMO_PROMPT)
        first_completion(server_flags, result.name, asked, max_tokens, started)
        console.print(how_to_ask(server_flags, result.name, asked), highlight=False, markup=False, soft_wrap=True)
        console.print("Ctrl-C ends the server.", highlight=False)
        status = server.wait()
    raise CommandError(f"tritonserver ended by itself with status {status}")


def demo_checkpoint() -> Path:
    """The demo checkpoint of a source checkout. Raises CommandError where there is none, as in an installed wheel."""
    folder = Path(pageflight_build.__file__).parents[1] / "demo_checkpoint"
    if not folder.is_dir():
        raise CommandError(f"no demo checkpoint here ({folder}); give your own with --checkpoint")
    return folder


def first_completion(flags: ServerFlags, name: str, prompt: str, max_tokens: int, started: float) -> None:
    """Stream one completion to the terminal and say how long it took."""
    server = Server(url=f"http://{flags.ports.local_host}:{flags.http_port}")
    request = {"text_input": prompt, "max_tokens": max_tokens}
    console.rule(f"{name} completes", align="left")
    sys.stdout.write(prompt)
    sys.stdout.flush()
    clock = _Clock()
    print_answers(clock.watch(server.stream(name, request)))
    console.rule()
    console.print(clock.summary(started), highlight=False, soft_wrap=True)


class _Clock:
    """Times of the responses that pass through."""

    def __init__(self) -> None:
        self._asked = time.monotonic()
        self._first = self._last = self._asked
        self._count = 0

    def watch(self, answers: Iterable[Answer]) -> Iterator[Answer]:
        for answer in answers:
            self._last = time.monotonic()
            if self._count == 0:
                self._first = self._last
            self._count += 1
            yield answer

    def summary(self, started: float) -> str:
        """First response since the request and since the command was given, and how the rest came."""
        since_start, since_asked = self._first - started, self._first - self._asked
        return (
            f"first token {since_asked * 1000:.0f} ms after the request, {since_start:.1f} s after the start;"
            f" {self._count} responses in {self._last - self._asked:.2f} s"
        )


def how_to_ask(flags: ServerFlags, name: str, prompt: str) -> str:
    """The three ways to call the server, ready to be copied."""
    url = f"http://{flags.ports.local_host}:{flags.http_port}"
    prompt = prompt.strip().partition("\n")[0]
    body = json.dumps({"text_input": prompt, "max_tokens": 32, "stream": True})
    python = (
        "import json, urllib.request as u; "
        f'print(json.load(u.urlopen("{url}/v2/models/{name}/generate", '
        f'json.dumps({{"text_input": {json.dumps(prompt)}, "max_tokens": 32}}).encode()))["text_output"])'
    )
    command = [Path(sys.argv[0]).name, "generate", prompt, "--model", name, "--max-tokens", "32", "--url", url]
    if os.sep in sys.argv[0] and shutil.which(command[0]) is None:  # the venv's bin folder is not on PATH
        command[0] = os.path.relpath(sys.argv[0])
    return "\n".join(
        (
            "",
            "Ask it:",
            f"  curl -sN {url}/v2/models/{name}/generate_stream -d {shlex.quote(body)}",
            f"  python3 -c {shlex.quote(python)}",
            f"  {shlex.join(command)}",
            "",
        )
    )
