"""`pageflight build`: a checkpoint becomes part of a model repository."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pageflight.cli.build_flags import BuildFlags
from pageflight.cli.console import console
from pageflight.cli.flags import takes

if TYPE_CHECKING:
    from pageflight_build.recipe import BuildResult


def default_root() -> Path:
    """Where repositories go that are not given a place: $PAGEFLIGHT_REPOSITORIES, else ./repositories."""
    return Path(os.environ.get("PAGEFLIGHT_REPOSITORIES") or "repositories")


@takes(BuildFlags, "flags")
def build(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder in Hugging Face format, or a hub id (owner/name, owner/name@revision).")
    ],
    flags: BuildFlags,
    repository: Annotated[
        Path | None, typer.Option(help="Model repository to write; by default repositories/NAME.")
    ] = None,
) -> None:
    """Turn a checkpoint into a Triton model repository.

    Reads and checks it, converts its weights, loads the engine and compares its logits with a reference, then puts the
    repository in place in one step. Doing it again changes nothing. Another checkpoint built into the same repository
    is served beside the first.

    Examples:

        pageflight build ./Llama-3.2-1B-Instruct --name llama
        pageflight build ./my-model --dtype int8 --kv-memory 4GiB --repository ./repo
    """
    result = run_build(flags, checkpoint, repository)
    console.print(f"Serve it with: pageflight serve {result.repository}", highlight=False, soft_wrap=True)


def run_build(flags: BuildFlags, checkpoint: str, repository: Path | None) -> BuildResult:
    """Build with progress on the terminal, and say what came of it."""
    from pageflight_build.progress import Terminal
    from pageflight_build.recipe import build as build_repository
    from pageflight_build.source import default_name

    name = flags.name or default_name(checkpoint)
    options = flags.options(checkpoint, repository or default_root() / name)
    console.print(f"Building [bold]{options.name}[/] from {options.checkpoint}", highlight=False, soft_wrap=True)
    result = build_repository(options, Terminal(console))
    manifest = result.manifest
    state = "unchanged" if result.reused else "built"
    console.print(
        f"{result.repository}: {state} in {result.seconds:.1f} s ({manifest.lowering}, {manifest.dtype},"
        f" K/V {manifest.kv_dtype}, up to {manifest.max_model_len} tokens)",
        highlight=False,
        soft_wrap=True,
    )
    return result
