"""`pageflight generate`: one completion, streamed to the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from pageflight.cli.client import Answer, Server
from pageflight.cli.errors import CommandError
from pageflight.cli.flags import takes
from pageflight.cli.sampling_flags import SamplingFlags
from pageflight.cli.watch_flags import WatchFlags
from pageflight.loop.watch import Watch

DEFAULT_URL = "http://localhost:8000"


@takes(SamplingFlags, "flags")
@takes(WatchFlags, "watch_flags")
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    flags: SamplingFlags,
    watch_flags: WatchFlags,
    url: Annotated[
        str, typer.Option(help="Server to ask: http://HOST:PORT, or grpc://HOST:PORT.", envvar="PAGEFLIGHT_URL")
    ] = DEFAULT_URL,
    model: Annotated[str, typer.Option(help="Model to ask.")] = "ensemble",
    local: Annotated[
        Path | None, typer.Option(help="Run the engine of this repository right here, without a server.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="With --local: which model, where there are several.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every response as one line of JSON.")] = False,
) -> None:
    """Complete a prompt with a running server, or with a repository directly.

    Examples:

        pageflight generate "def read_file(path):" --max-tokens 60
        pageflight generate - --url grpc://gpu1:8001 --temperature 0.8 --seed 7 < prompt.txt
        pageflight generate "Once upon a time" --local repositories/demo -p return_finish_reason=true --json
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    request = flags.request(text)
    watch = watch_flags.watch
    if local is None and watch != Watch():
        raise CommandError("--record and --check-invariants watch an engine of this command: they need --local")
    with answering(url, local, name, watch) as ask:
        print_answers(ask.stream(model, request), as_json=as_json)


class Answering(Protocol):
    """Who answers: a server, or an engine in this process's care."""

    def stream(self, model: str, request: Mapping[str, Any]) -> Iterator[Answer]: ...


@contextmanager
def answering(url: str, local: Path | None, name: str | None = None, watch: Watch | None = None) -> Iterator[Answering]:
    """The server at `url`, or an engine of the repository `local` for as long as the block lasts."""
    if local is None:
        yield Server(url=url)
        return
    from pageflight.cli.local import local_engine

    with local_engine(local, name, watch) as engine:
        yield engine


def print_answers(answers: Iterable[Answer], *, as_json: bool = False) -> str:
    """Print the new text of each response as it comes; returns all of it."""
    parts: list[str] = []
    for answer in answers:
        text = answer.get("text_output", "")
        parts.append(text if isinstance(text, str) else "".join(text))
        sys.stdout.write(json.dumps(answer) + "\n" if as_json else parts[-1])
        sys.stdout.flush()
    if not as_json:
        sys.stdout.write("\n")
    return "".join(parts)
