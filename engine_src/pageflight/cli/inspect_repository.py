"""`pageflight inspect`: what a repository holds, from its manifests alone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from pageflight.cli.console import console, output
from pageflight.cli.errors import CommandError
from pageflight.core.manifest import MANIFEST_NAME, EngineManifest

_READ_BYTES = 1 << 22


def inspect(
    repository: Annotated[Path, typer.Argument(help="A model repository, or one engine directory in it.")],
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file and compare with the manifest.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifests as one JSON list.")] = False,
) -> None:
    """Show what was built: models, precision, sizes, and what the engine was built for.

    Example:

        pageflight inspect repositories/demo --verify
    """
    folders = find_engines(repository)
    manifests = [EngineManifest.read(folder) for folder in folders]
    if as_json:
        output.print(json.dumps([asdict(manifest) for manifest in manifests], indent=1))
    else:
        for folder, manifest in zip(folders, manifests, strict=True):
            _show(repository, folder, manifest)
    if verify:
        problems = [p for folder, manifest in zip(folders, manifests, strict=True) for p in damaged(folder, manifest)]
        if problems:
            raise CommandError("; ".join(problems) + "; build the repository again")
        console.print("[green]✓[/] every file is the one that was built", highlight=False)


def find_engines(repository: Path) -> list[Path]:
    """Engine directories under `repository`. Raises CommandError when there is none."""
    if (repository / MANIFEST_NAME).is_file():
        return [repository]
    found = sorted(path.parent for path in repository.glob(f"*/*/artifacts*/{MANIFEST_NAME}"))
    if not found:
        raise CommandError(
            f"{repository} holds no engine; build one: pageflight build CHECKPOINT --repository {repository}"
        )
    return found


def engine_named(repository: Path, name: str | None) -> Path:
    """The engine directory of model `name`, or the only one; the first of a model whose instances have several. Raises
    CommandError naming the choices."""
    engines = {EngineManifest.read(folder).name: folder for folder in reversed(find_engines(repository))}
    if name is None and len(engines) == 1:
        return next(iter(engines.values()))
    if name not in engines:
        raise CommandError(f"name={name!r}: {repository} holds {', '.join(sorted(engines))}; choose one with --name")
    return engines[name]


def damaged(folder: Path, manifest: EngineManifest) -> list[str]:
    """One sentence for each file of the engine that is not what the manifest says."""
    problems = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("hashing", total=sum(record.num_bytes for record in manifest.files))
        for record in manifest.files:
            path = folder / record.path
            if not path.is_file():
                problems.append(f"{path} is missing")
                continue
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while piece := file.read(_READ_BYTES):
                    digest.update(piece)
                    progress.advance(task, len(piece))
            if digest.hexdigest() != record.sha256:
                problems.append(f"{path} was changed after the build")
    return problems


def _show(repository: Path, folder: Path, manifest: EngineManifest) -> None:
    model = manifest.model
    groups = f", groups of {manifest.quant_group_size}" if manifest.quant_group_size else ""
    kv_bytes = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "u8": 1}[manifest.kv_dtype]
    per_token = 2 * int(model["num_layers"]) * int(model["num_kv_heads"]) * int(model["head_dim"]) * kv_bytes
    rows: list[tuple[str, Any]] = [
        ("engine", f"{folder.relative_to(repository)}" if folder != repository else "."),
        ("lowering", f"{manifest.lowering}, {manifest.dtype}{groups}; K/V cache {manifest.kv_dtype}"),
        (
            "shape",
            f"{manifest.family}, {model['num_layers']} layers, hidden {model['hidden_size']},"
            f" {model['num_heads']} heads, {model['num_kv_heads']} K/V heads of {model['head_dim']}",
        ),
        ("vocabulary", f"{manifest.vocab_size} tokens; ends with {list(manifest.eos_token_ids)}"),
        (
            "sequences",
            f"up to {manifest.max_model_len} tokens, blocks of {manifest.block_size},"
            f" {per_token:,} bytes of K/V per token",
        ),
        ("deterministic", "verified" if manifest.deterministic else "not asked for"),
        ("built for", ", ".join(f"{key} {value}" for key, value in manifest.fingerprint.items())),
    ]
    if manifest.tensor_parallel > 1:  # others run on any number
        rows.insert(-1, ("ranks", f"{manifest.tensor_parallel}, each with its part of the weights"))
    table = Table(title=manifest.name, title_justify="left", show_header=False, box=None)
    for row in rows:
        table.add_row(*row)
    for record in manifest.files:
        table.add_row("file", f"{record.path}  {record.num_bytes:,} bytes  sha256 {record.sha256[:12]}…")
    output.print(table)
