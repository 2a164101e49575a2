"""Shared memory of a tritonserver: it removes its segments when it ends, but not those of models it could not unload,
and none when it is killed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path

_MAPPED = re.compile(r" /dev/shm/(triton_python_backend_shm_region_[\w-]+)$", re.MULTILINE)
FOLDER = Path("/dev/shm")


def segments_of(pid: int, proc: Path = Path("/proc")) -> frozenset[str]:
    """Names of the Python backend's segments that this process has mapped; none when it has ended."""
    with contextlib.suppress(OSError):
        return frozenset(_MAPPED.findall((proc / str(pid) / "maps").read_text(encoding="utf-8", errors="replace")))
    return frozenset()


def remove(segments: Iterable[str], folder: Path = FOLDER) -> None:
    """Remove what is left of them. Their names are random: nobody else's is called like that."""
    for name in segments:
        with contextlib.suppress(OSError):
            (folder / name).unlink()
