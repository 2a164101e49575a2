"""`pageflight replay`: a recorded run once more, to see whether everything comes out the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from pageflight.cli.console import console, output
from pageflight.cli.errors import CommandError
from pageflight.cli.inspect_repository import engine_named
from pageflight.loop.recorder import read_entries
from pageflight.loop.recording import Header
from pageflight.loop.replay import Replayed
from pageflight.loop.replay import replay as replay_entries
from pageflight.loop.watched_scheduler import InvariantBroken
from pageflight.runners.base import Runner


def replay(
    files: Annotated[list[Path], typer.Argument(help="Recordings, made with --record.")],
    engine: Annotated[
        Path | None,
        typer.Option(help="Engine directory, or repository, to compute the sampled ids again with."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="With --engine: which model, where there are several.")] = None,
    check_invariants: Annotated[
        bool, typer.Option("--check-invariants", help="Check every invariant after every step.")
    ] = False,
) -> None:
    """Run recorded requests through the scheduler again and compare every plan, bit for bit.

    The scheduler gets the calls, times and sampled ids of the recording; with --engine the model computes the ids
    again, and they are compared as well. Names the first step that differs, with status 1.

    Examples:

        pageflight replay run.0-20250101T120000-4711.rec
        pageflight replay run.*.rec --engine repositories/demo
    """
    differing = []
    for file in files:
        replayed = replay_file(file, engine, name, check=check_invariants)
        output.print(f"{file}: {summary(replayed)}", highlight=False, soft_wrap=True, markup=False)
        if replayed.died:
            console.print(f"The recorded core died: {replayed.died}", highlight=False, soft_wrap=True, markup=False)
        if replayed.difference is not None:
            differing.append(f"{file}: {replayed.difference}")
    if differing:
        raise CommandError("; ".join(differing))


def replay_file(file: Path, engine: Path | None, name: str | None, *, check: bool) -> Replayed:
    """Replay one recording. Raises ConfigError for what is none, ManifestMismatch for an engine of another kind."""
    entries = read_entries(file)
    header = next(entries, None)
    if not isinstance(header, Header):
        raise CommandError(f"{file} has no beginning: the core was killed before it wrote one")
    try:
        if engine is None:
            return replay_entries(header, entries, check=check)
        with _runner(engine, name, header) as runner:
            return replay_entries(header, entries, runner=runner, check=check)
    except InvariantBroken as error:
        raise CommandError(f"{file}: {error}") from None


def summary(replayed: Replayed) -> str:
    same = "all the same" if replayed.difference is None else "the same before the one that differs"
    return (
        f"{replayed.num_steps} steps, {same}; {replayed.num_requests} requests, {replayed.num_refused} of them refused;"
        f" {replayed.num_tokens} tokens in {replayed.last_s - replayed.first_s:.1f} s"
    )


@contextmanager
def _runner(engine: Path, name: str | None, header: Header) -> Iterator[Runner]:
    from pageflight.loop.core_process import silence_telemetry
    from pageflight.runners.factory import load_engine

    silence_telemetry()
    config = replace(header.config, launcher="local", num_nodes=1)  # all ranks are here, wherever they were
    runner = load_engine(engine_named(engine, name), config, num_instances=header.num_instances).runner
    try:
        if runner.limits.block_size != header.config.kv.block_size or runner.limits.vocab_size != header.vocab_size:
            raise CommandError(f"{engine} is another engine than the recorded one ({header.engine_dir})")
        yield runner
    finally:
        runner.close()
