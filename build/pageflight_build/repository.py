"""The model repository as a folder: whose it is, where engines lie in it, and how a new state of it is assembled."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pageflight.core.errors import ConfigError, ManifestMismatch
from pageflight.core.manifest import EngineManifest
from pageflight_build import triton_config
from pageflight_build.record import ModelRecord, RepositoryRecord

ARTIFACTS = Path("1") / "artifacts"


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Only one build at a time changes what lies beside `target`; leftovers of builds that were killed are removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for leftover in target.parent.glob(f".{target.name}.*.building"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        os.close(descriptor)


def open_target(target: Path, *, force: bool) -> RepositoryRecord:
    """The record of the repository at `target`, empty where there is nothing yet.

    Raises ConfigError for a folder that this program did not make. `force` replaces such a folder too, if it is a
    model repository; anything else is never removed.
    """
    empty = RepositoryRecord(generated={})
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return empty
    if not target.is_dir():
        raise ConfigError(f"{target} is a file; choose another --repository")
    try:
        record = RepositoryRecord.read(target)
    except ConfigError:
        if not force:
            raise
        return empty
    if record is not None:
        return record
    foreign = [entry.name for entry in target.iterdir() if not (entry / "config.pbtxt").is_file()]
    if foreign:
        raise ConfigError(
            f"{target} is not empty and no model repository (it holds {', '.join(sorted(foreign)[:3])});"
            " choose another --repository"
        )
    if not force:
        raise ConfigError(
            f"{target} is a model repository that pageflight did not build; --force replaces all of it,"
            " or choose another --repository"
        )
    return empty


def engine_dir(root: Path, models: Sequence[ModelRecord], name: str) -> Path:
    """The engine directory of model `name` in a repository of `models`."""
    return root / triton_config.engine_model_name(deployment_of(models, name)) / ARTIFACTS


def engine_kept(root: Path, record: RepositoryRecord, wanted: ModelRecord) -> Path | None:
    """The engine directory that `wanted` can use as it is; None when it must be made."""
    known = record.model(wanted.name)
    if known is None or known.engine_inputs != wanted.engine_inputs:
        return None
    folder = engine_dir(root, record.models, wanted.name)
    try:
        manifest = EngineManifest.read(folder)
    except ManifestMismatch:
        return None
    files = [(folder / item.path, item.num_bytes) for item in manifest.files]
    complete = all(path.is_file() and path.stat().st_size == size for path, size in files)
    return folder if complete else None


def unchanged(record: RepositoryRecord, wanted: ModelRecord) -> bool:
    """Would a build of `wanted` write what is there?"""
    known = record.model(wanted.name)
    return (
        known is not None
        and (known.engine_inputs, known.serving) == (wanted.engine_inputs, wanted.serving)
        and (known.default or not wanted.default)
    )
