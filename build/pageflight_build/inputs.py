"""What an engine was made from, as one digest: equal digests need no second build."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from pageflight import __version__
from pageflight_build.options import EngineOptions, ServingOptions
from pageflight_build.source import WANTED
from pageflight_build.target import chosen_dtype, limits_of_steps, package_name

_SMALL_BYTES = 1 << 20


def engine_inputs(checkpoint: Path, options: EngineOptions, serving: ServingOptions, num_ranks: int = 1) -> str:
    """sha256 over options, versions and the checkpoint's files. `num_ranks`: that the engine is cut for.

    Small files count by their bytes, weights by name, size and time of change: hashing tens of gigabytes to learn that
    nothing happened would take longer than it may. A touched file is built again, never missed.
    """
    digest = hashlib.sha256()
    chosen = asdict(options)
    chosen["dtype"] = chosen_dtype(options)
    package = package_name(options)
    versions = {"pageflight": __version__, package: _version(package)}
    digest.update(json.dumps([chosen, versions, num_ranks, limits_of_steps(options, serving)], sort_keys=True).encode())
    for path in sorted({path for pattern in WANTED for path in checkpoint.glob(pattern) if path.is_file()}):
        status = path.stat()
        digest.update(f"\n{path.relative_to(checkpoint).as_posix()} {status.st_size} ".encode())
        digest.update(path.read_bytes() if status.st_size <= _SMALL_BYTES else str(status.st_mtime_ns).encode())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""  # the build says what is missing when it needs the package
