"""From an engine directory to a runner on a GPU, with what memory the GPU has left for K/V blocks."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from pageflight.core.config import EngineConfig
from pageflight.core.errors import ConfigError
from pageflight.core.manifest import EngineManifest
from pageflight.kv.capacity import Capacity, FreeMemory, free_memory, resolve_capacity
from pageflight.lowering.device_model import DeviceModel, KernelModel
from pageflight.lowering.engine_dir import Verification, open_engine
from pageflight.lowering.tensorrt_model import load_segments
from pageflight.lowering.torch_lowering import TorchLowering
from pageflight.runners.device import DeviceRunner

log = logging.getLogger(__name__)

RESERVED_BYTES = 1 << 30
"""For what is not measured beforehand: captured graphs, library handles, splits of contexts."""


def find_gpu() -> torch.device | None:
    """The GPU that this process is to use; None where there is none, or torch was built without CUDA."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def load_on_gpu(
    engine_dir: Path, config: EngineConfig, device: torch.device, *, num_instances: int = 1
) -> tuple[DeviceRunner, Capacity]:
    """Load an engine of the torch or the TensorRT lowering onto `device`.

    TensorRT engines that the card does not take, or whose package is not here, run on our kernels: the reason is
    logged, and the weights are the same.

    Blocks get what is left of `kv.gpu_memory_utilization` of the GPU's memory beside weights and the largest pass,
    which is measured; what others have of the GPU is not counted, as long as there is enough beside it. Raises
    ManifestMismatch for an engine that does not fit, ConfigError for settings that cannot work.
    """
    if config.scheduler.deterministic:
        raise ConfigError("deterministic: not available on a GPU yet; leave it out, or build with --engine openvino")
    taken_before = _taken(device)
    model, longest = _model(engine_dir, device)
    scheduler = replace(config.scheduler, max_model_len=min(config.scheduler.max_model_len, longest))
    most_tokens = max(scheduler.max_num_tokens, scheduler.max_num_seqs)
    pass_bytes = model.pass_bytes(most_tokens, scheduler.max_num_seqs)
    capacity = resolve_capacity(
        replace(config.kv, block_size=model.blocks.block_size),
        scheduler,
        bytes_per_block=model.blocks.bytes_per_block,
        free=_free(device, config, pass_bytes, taken_before),
        host_free=free_memory() if device.type == "cuda" else None,
        num_instances=num_instances,
        fraction=1.0,
    )
    log.info("%s: a pass takes %d bytes; cache: %s", device, pass_bytes, capacity.reason)
    runner = DeviceRunner(
        model,
        num_blocks=capacity.kv.num_blocks,
        num_host_blocks=capacity.kv.num_host_blocks,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_tokens=most_tokens,
        max_model_len=capacity.max_sequence_len,
    )
    if device.type == "cuda":
        runner.warm_up(scheduler.max_num_tokens)
    return runner, capacity


def _model(engine_dir: Path, device: torch.device) -> tuple[DeviceModel, int]:
    """An engine's model and the longest sequence it is for."""
    if EngineManifest.read(engine_dir).lowering == "torch":
        engine, verification = TorchLowering().open(engine_dir)
        model: DeviceModel = KernelModel.load(engine, device)
    else:
        engine = open_engine(engine_dir, "tensorrt")
        verification = Verification(engine)
        try:
            model = load_segments(engine, engine_dir, device)
        except ConfigError as error:
            log.warning("%s; it runs on kernels of our own instead", error)
            model = KernelModel.load(engine, device)
    verification.finish()
    return model, engine.manifest.max_model_len


def _taken(device: torch.device) -> int:
    """Bytes of a GPU that are in use, by whomever."""
    if device.type != "cuda":
        return 0
    left, total = torch.cuda.mem_get_info(device)
    return total - left


def _free(device: torch.device, config: EngineConfig, pass_bytes: int, taken_before: int) -> FreeMemory | None:
    """Memory for blocks; None takes what the host has, for a device that is the host's processor. `taken_before`: bytes
    in use before the model was loaded."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    left, total = torch.cuda.mem_get_info(device)
    used = max(0, total - left - taken_before)
    if config.kv.num_blocks:  # a core started again gets what the first one had, if it is there at all
        return FreeMemory(num_bytes=max(0, left - pass_bytes), source=f"left on {torch.cuda.get_device_name(device)}")
    utilization = config.kv.gpu_memory_utilization
    num_bytes = max(0, min(int(total * utilization) - used, left) - pass_bytes - RESERVED_BYTES)
    name = torch.cuda.get_device_name(device)
    source = f"gpu_memory_utilization={utilization:g} of {name}, {used} in use, {taken_before} by others"
    return FreeMemory(num_bytes=num_bytes, source=source)
