"""Where a checkpoint comes from: a folder, or a Hugging Face hub id found in the local cache or fetched."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from pageflight.core.errors import CheckpointError

WANTED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")

Fetch = Callable[..., str]


def resolve_checkpoint(wanted: str, *, files: tuple[str, ...] = WANTED, fetch: Fetch | None = None) -> Path:
    """The folder of the checkpoint `wanted`: a path, or `owner/name[@revision]` of the Hugging Face hub.

    A hub id is looked for in the local cache first and fetched (`files` only: by default safetensors and tokenizer
    files) when it is not there. `fetch` stands in for `huggingface_hub.snapshot_download`. Raises CheckpointError that
    says what to do.
    """
    folder = Path(wanted).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise CheckpointError(f"{wanted} is a file; give the folder with config.json and the safetensors")
    if not _HUB_ID.fullmatch(wanted) or wanted.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{wanted} does not exist, and it is no Hugging Face id (owner/name) either; give the checkpoint's folder"
        )
    name, _, revision = wanted.partition("@")
    return _from_hub(wanted, name, revision or None, files, fetch or _hub_fetch())


def default_name(wanted: str) -> str:
    """A model name from the last part of a path or hub id, with what a model's name cannot hold replaced."""
    last = Path(wanted.partition("@")[0] if not Path(wanted).exists() else Path(wanted).resolve()).name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._") or "model"


def _hub_fetch() -> Fetch:
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise CheckpointError(
            "a Hugging Face id needs huggingface_hub: pip install huggingface_hub, or give a local folder"
        ) from None
    return snapshot_download


def _from_hub(wanted: str, name: str, revision: str | None, files: tuple[str, ...], fetch: Fetch) -> Path:
    # huggingface_hub's errors of a missing snapshot derive from these two
    with contextlib.suppress(OSError, ValueError):
        cached = Path(fetch(name, revision=revision, allow_patterns=list(files), local_files_only=True))
        needs_weights = any(name.endswith(".safetensors") for name in files)
        if (cached / "config.json").is_file() and (not needs_weights or any(cached.glob("*.safetensors"))):
            return cached.resolve()
    advice = "fetch it on a machine with network (huggingface-cli download), copy the folder here and give its path"
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        raise CheckpointError(f"{wanted} is not in the local Hugging Face cache and HF_HUB_OFFLINE is set; {advice}")
    try:
        return Path(fetch(name, revision=revision, allow_patterns=list(files))).resolve()
    except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{wanted} could not be fetched from the Hugging Face hub ({reason}); check the id and your access"
            f" (huggingface-cli login for gated models), or {advice}"
        ) from None
