"""Files in which TensorRT keeps what it learnt about a GPU: timings of a build, kernels compiled while running.

They lie in a folder of the user's, never in a model repository, which may be read-only and may move to another GPU. A
file begins with the sha256 of what follows: TensorRT is given nothing that is not as it wrote it. None of them is
needed: without one, things take longer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pageflight.lowering.tensorrt_gpu import Gpu

log = logging.getLogger(__name__)

_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_folder() -> Path:
    """`pageflight/tensorrt` in $XDG_CACHE_HOME or ~/.cache."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(given) if os.path.isabs(given) else Path(os.path.expanduser("~")) / ".cache"
    return root / "pageflight" / "tensorrt"


def timing_path(package: str, version: str, gpu: Gpu) -> Path:
    """Where builds of one version of a package for one kind of GPU keep their timings."""
    return cache_folder() / f"timing-{_slug(package)}-{_slug(version)}-{_slug(gpu.name)}.cache"


def runtime_path(fingerprint: Mapping[str, str], engine_hashes: list[str], gpu: Gpu) -> Path:
    """Where the kernels of some engines are kept: engines that are byte for byte the same share them."""
    facts = json.dumps([sorted(fingerprint.items()), engine_hashes, gpu.capability, gpu.driver])
    digest = hashlib.sha256(facts.encode()).hexdigest()
    return cache_folder() / f"runtime-{_slug(gpu.name)}-{digest[:16]}.cache"


def read_cache(path: Path) -> bytes:
    """What `write_cache` was given; nothing where there is none and, with a line in the log, where it is damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        log.warning("%s cannot be read (%s): TensorRT begins without it", path, error.strerror)
        return b""
    data = content[_DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != content[:_DIGEST_BYTES]:
        log.warning("%s is damaged: TensorRT begins without it", path)
        return b""
    return data


def write_cache(path: Path, data: bytes) -> None:
    """Replace the file, all of it or nothing; where that cannot be, the log says so."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(hashlib.sha256(data).digest() + data)
        os.replace(partial, path)
    except OSError as error:
        log.warning("%s cannot be written (%s): the next start takes as long as this one", path, error.strerror)


class TimingCache:
    """Timings of kernels on the builder's GPU, from one build to the next. The full flavor measures; RTX never does."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = read_cache(path)
        self.data = self._known

    def attach(self, settings: Any) -> None:
        """Give the timings so far to the builder settings of one engine."""
        timings = settings.create_timing_cache(self.data)
        if timings is None or not settings.set_timing_cache(timings, False):  # False: not those of another GPU
            log.warning("%s does not fit this GPU and TensorRT: it is measured anew", self._path)
            self.data = b""
            settings.set_timing_cache(settings.create_timing_cache(b""), False)

    def take(self, settings: Any) -> None:
        """Keep what the build of that engine added."""
        timings = settings.get_timing_cache()
        if timings is not None:
            self.data = _serialised(timings, self._path) or self.data

    def save(self) -> None:
        """Write the file, if there is anything new. Of two builds at once the later one's timings stay."""
        if self.data and self.data != self._known:
            write_cache(self._path, self.data)
            self._known = self.data


class RuntimeCache:
    """Kernels that the RTX flavor compiled for this GPU: all engines of a process share them, and the next one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = read_cache(path)
        self._cache: Any = None

    def attach(self, settings: Any) -> None:
        """Let the contexts of these runtime settings find and leave kernels here."""
        if self._cache is None:
            self._cache = settings.create_runtime_cache()
            if self._known and not self._cache.deserialize(self._known):
                log.warning("%s does not fit this GPU, driver and TensorRT: kernels are compiled anew", self._path)
                self._known = b""
        settings.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the file, if kernels were compiled since it was read or written."""
        data = b"" if self._cache is None else _serialised(self._cache, self._path)
        if data and data != self._known:
            write_cache(self._path, data)
            self._known = data


def _serialised(cache: Any, path: Path) -> bytes:
    """What a cache of TensorRT's holds; nothing, and a line in the log, where it does not give it."""
    try:
        memory = cache.serialize()
        if memory is not None:
            return bytes(memory)
        reason = "it gave no reason"
    except (RuntimeError, TypeError, AttributeError) as error:  # of the bindings: which ones is not documented
        reason = str(error)
    log.warning("%s is not written, TensorRT does not say what it holds: %s", path, reason)
    return b""


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
