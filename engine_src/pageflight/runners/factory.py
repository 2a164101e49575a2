"""From an engine directory to a runner with its memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pageflight.core.config import EngineConfig
from pageflight.core.errors import ConfigError, PageflightError
from pageflight.core.manifest import EngineManifest
from pageflight.kv.capacity import Capacity
from pageflight.lowering import registry
from pageflight.runners.base import Runner
from pageflight.runners.host import run_on_host

if TYPE_CHECKING:
    import torch


log = logging.getLogger(__name__)

_ON_GPU = ("torch", "tensorrt")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LoadedEngine:
    """A runner, what it runs, how much cache it got and why."""

    runner: Runner
    manifest: EngineManifest
    capacity: Capacity
    num_threads: int


def load_engine(
    engine_dir: Path,
    config: EngineConfig,
    *,
    num_instances: int = 1,
    needs_gpu: str = "",
    on_loss: Callable[[PageflightError], None] | None = None,
    progress: Callable[[str], None] = log.info,
) -> LoadedEngine:
    """Load the engine that `pageflight build` wrote and give it its K/V blocks.

    The lowering named by the manifest checks fingerprint, sizes and hashes of the files. `max_model_len` is the lesser
    of the configuration's, the engine's and what the cache holds. `num_instances` share this machine's memory and,
    where `config.num_threads` is 0, its cores. Engines of torch and TensorRT run on a GPU where there is one;
    `needs_gpu`, if not empty, names the GPU that this one must run on. `on_loss` is told, by a thread, when one of
    several ranks is gone and no step is there to say so, `progress` what is waited for. Raises ManifestMismatch for an
    engine that is damaged or was built for something else, ConfigError for settings that cannot work,
    RanksMissing where others have not started their ranks in time.
    """
    if config.num_threads < 0:
        raise ConfigError(f"num_threads={config.num_threads}: must not be negative (0 uses all cores)")
    if num_instances < 1:
        raise ConfigError(f"num_instances={num_instances}: must be at least 1")
    manifest = EngineManifest.read(engine_dir)
    device = _gpu() if manifest.lowering in _ON_GPU else None
    if needs_gpu and device is None:
        missing = "torch sees no GPU" if manifest.lowering in _ON_GPU else f"{manifest.lowering} runs on CPUs"
        raise ConfigError(f"{needs_gpu}: the engine cannot run on it: {missing}")
    if (config.tensor_parallel, config.pipeline_parallel, config.launcher) != (1, 1, "local"):
        from pageflight.runners.parallel import load_parallel  # imports torch

        num_threads = config.num_threads or max(1, num_usable_cores() // num_instances)
        several, capacity = load_parallel(
            engine_dir,
            config,
            num_threads=num_threads,
            num_instances=num_instances,
            on_loss=on_loss,
            progress=progress,
        )
        return LoadedEngine(runner=several, manifest=manifest, capacity=capacity, num_threads=num_threads)
    if device is not None:
        from pageflight.runners.device_factory import load_on_gpu  # imports torch and triton

        on_gpu, capacity = load_on_gpu(engine_dir, config, device, num_instances=num_instances)
        return LoadedEngine(runner=on_gpu, manifest=manifest, capacity=capacity, num_threads=1)
    num_threads = config.num_threads or max(1, num_usable_cores() // num_instances)
    lowering = registry.get(manifest.lowering)
    model = lowering.load(engine_dir, num_threads=num_threads)
    runner, capacity = run_on_host(lowering, model, manifest, config, num_instances=num_instances)
    return LoadedEngine(runner=runner, manifest=manifest, capacity=capacity, num_threads=num_threads)


def _gpu() -> torch.device | None:
    """The GPU that engines of the torch lowering run on; None without one, or without torch."""
    try:
        from pageflight.runners.device_factory import find_gpu
    except ModuleNotFoundError:  # torch or triton: the lowering says what to install
        return None
    return find_gpu()


def num_usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: its affinity mask, cut by its container's quota (cgroup v2, v1)."""
    cores = len(os.sched_getaffinity(0))
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = " ".join((cgroup / name).read_text(encoding="ascii") for name in names).split()
        except OSError:  # the other version, or no control groups
            continue
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
            cores = min(cores, max(1, round(int(words[0]) / int(words[1]))))
    return cores
