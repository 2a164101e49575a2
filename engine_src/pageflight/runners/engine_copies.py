"""A rank's own copy of the engine that the first rank has."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec

from pageflight.core.errors import ManifestMismatch
from pageflight.core.manifest import MANIFEST_NAME, manifest_digest
from pageflight.ranks.messages import RankSpec


def own_copy(spec: RankSpec, engine_dir: Path | None) -> RankSpec:
    """`spec` with the engine directory of this machine: the first rank's path, or else `engine_dir`, which may be a
    repository with the engine somewhere. Raises ManifestMismatch where none is the same engine."""
    wanted = engine_dir or Path(spec.engine_dir)
    found = list(_engines(wanted))
    for folder in found:
        if manifest_digest(folder) == spec.manifest_digest:
            return msgspec.structs.replace(spec, engine_dir=str(folder))
    what = f"another engine than the first rank's {spec.engine_dir}" if found else "no engine"
    raise ManifestMismatch(
        f"rank {spec.place.rank} on {socket.gethostname()}: {wanted} has {what}; copy the repository to this machine"
    )


def _engines(folder: Path) -> Iterator[Path]:
    """Engine directories: `folder` itself, or those of a repository's models."""
    if (folder / MANIFEST_NAME).is_file():
        yield folder
    else:
        yield from sorted(path.parent for path in folder.glob(f"*/*/*/{MANIFEST_NAME}"))
