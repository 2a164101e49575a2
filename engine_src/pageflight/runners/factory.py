"""From an engine directory to a runner with its memory."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pageflight.core.config import EngineConfig
from pageflight.core.errors import ConfigError
from pageflight.core.manifest import EngineManifest
from pageflight.kv.capacity import Capacity, resolve_capacity
from pageflight.lowering import registry
from pageflight.runners.base import Runner
from pageflight.runners.local import LocalRunner

if TYPE_CHECKING:
    import torch


_ON_GPU = ("torch", "tensorrt")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LoadedEngine:
    """A runner, what it runs, how much cache it got and why."""

    runner: Runner
    manifest: EngineManifest
    capacity: Capacity
    num_threads: int


def load_engine(engine_dir: Path, config: EngineConfig, *, num_instances: int = 1, needs_gpu: str = "") -> LoadedEngine:
    """Load the engine that `pageflight build` wrote and give it its K/V blocks.

    The lowering named by the manifest checks fingerprint, sizes and hashes of the files. `max_model_len` is the lesser
    of the configuration's, the engine's and what the cache holds. `num_instances` share this machine's memory and,
    where `config.num_threads` is 0, its cores. Engines of torch and TensorRT run on a GPU where there is one;
    `needs_gpu`, if not empty, names the GPU that this one must run on. Raises ManifestMismatch for an engine that is
    damaged or was built for something else, ConfigError for settings that cannot work.
    """
    if config.num_threads < 0:
        raise ConfigError(f"num_threads={config.num_threads}: must not be negative (0 uses all cores)")
    if num_instances < 1:
        raise ConfigError(f"num_instances={num_instances}: must be at least 1")
    manifest = EngineManifest.read(engine_dir)
    if manifest.lowering in _ON_GPU and (device := _gpu()) is not None:
        from pageflight.runners.device_factory import load_on_gpu  # imports torch and triton

        on_gpu, capacity = load_on_gpu(engine_dir, config, device, num_instances=num_instances)
        return LoadedEngine(runner=on_gpu, manifest=manifest, capacity=capacity, num_threads=1)
    if needs_gpu:
        missing = "torch sees no GPU" if manifest.lowering in _ON_GPU else f"{manifest.lowering} runs on CPUs"
        raise ConfigError(f"{needs_gpu}: the engine cannot run on it: {missing}")
    num_threads = config.num_threads or max(1, num_usable_cores() // num_instances)
    lowering = registry.get(manifest.lowering)
    model = lowering.load(engine_dir, num_threads=num_threads)
    try:
        if config.scheduler.deterministic:
            model = lowering.deterministic(
                model, name=manifest.title, max_num_tokens=config.scheduler.max_num_tokens + model.block_size
            )
        scheduler = replace(config.scheduler, max_model_len=min(config.scheduler.max_model_len, manifest.max_model_len))
        capacity = resolve_capacity(
            replace(config.kv, block_size=model.block_size),
            scheduler,
            bytes_per_block=model.kv_bytes_per_block,
            num_instances=num_instances,
        )
        runner = LocalRunner(
            model,
            num_blocks=capacity.kv.num_blocks,
            num_host_blocks=capacity.kv.num_host_blocks,
            max_num_seqs=scheduler.max_num_seqs,
            max_model_len=capacity.max_sequence_len,
            deterministic=scheduler.deterministic,
        )
    except BaseException:
        model.close()
        raise
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
