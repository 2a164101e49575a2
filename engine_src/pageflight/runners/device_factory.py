"""From an engine directory to a runner on a GPU, with what memory the GPU has left for K/V blocks."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pageflight.core.config import EngineConfig, SchedulerConfig
from pageflight.core.errors import ConfigError, OutOfMemory
from pageflight.core.manifest import EngineManifest
from pageflight.kernels.launcher import check_launcher
from pageflight.kv.capacity import Capacity, FreeMemory, free_memory, resolve_capacity
from pageflight.lowering.communicator import Communicator
from pageflight.lowering.device_model import DeviceModel, KernelModel
from pageflight.lowering.engine_dir import Verification, open_engine
from pageflight.lowering.tensorrt_model import load_segments
from pageflight.lowering.torch_lowering import TorchLowering
from pageflight.runners.device import DeviceRunner
from pageflight.runners.device_rows import rows_bytes
from pageflight.runners.device_stage import DeviceStageRunner, open_lines
from pageflight.runners.device_wishes import wishes_bytes
from pageflight.runners.host import share

log = logging.getLogger(__name__)

SHRUNK_TO, LEAST_SHARE = 0.9, 0.5
"""Share of its blocks that a cache keeps when they do not fit, and that of the computed size that it keeps at least."""
RESERVED_BYTES = 1 << 30
"""For what is not measured beforehand: CUDA's context, captured graphs, library handles, splits of contexts."""


def find_gpu() -> torch.device | None:
    """The GPU that this process is to use; None where there is none, or torch was built without CUDA."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def load_on_gpu(
    engine_dir: Path,
    config: EngineConfig,
    device: torch.device,
    *,
    num_instances: int = 1,
    communicator: Communicator | None = None,
) -> tuple[DeviceRunner, Capacity]:
    """Load an engine of the torch or the TensorRT lowering onto `device`.

    TensorRT engines that the card does not take, or whose package is not here, run on our kernels: the reason is
    logged, and the weights are the same.

    Blocks get what is left of `kv.gpu_memory_utilization` of the GPU's memory beside weights and the largest pass,
    which is measured; what others have of the GPU is not counted, as long as there is enough beside it.
    `num_instances` that may use the same GPU have that part of its memory in equal shares. With a `communicator` this
    is one rank's part of an engine, on its own GPU: of its stage, its heads. Sizes of the cache are shared by the
    ranks, and all have as many blocks as the one with the fewest. Where one rank cannot run TensorRT engines, none
    does. Raises ManifestMismatch for an engine that does not fit, ConfigError for settings that cannot work.
    """
    if config.scheduler.deterministic:
        raise ConfigError("deterministic: not available on a GPU yet; leave it out, or build with --engine openvino")
    if device.type == "cuda":
        check_launcher()
    model, longest = _model(engine_dir, device, communicator)
    if communicator is not None:
        if communicator.place.pipeline_parallel > 1:
            open_lines(communicator, device)
        own_bytes = model.blocks.bytes_per_block
        config = replace(config, kv=share(config.kv, own_bytes, communicator.total(own_bytes)))
    scheduler = replace(config.scheduler, max_model_len=min(config.scheduler.max_model_len, longest))
    most_tokens = max(scheduler.max_num_tokens, scheduler.max_num_seqs)
    pass_bytes = model.pass_bytes(most_tokens, scheduler.max_num_seqs)
    pass_bytes += rows_bytes(scheduler.max_num_seqs, scheduler.max_model_len, model.blocks.block_size)
    if model.stage.is_last:
        pass_bytes += wishes_bytes(scheduler.max_num_seqs, model.config.vocab_size)
    free = _free(device, config, pass_bytes, num_instances)
    capacity = resolve_capacity(
        replace(config.kv, block_size=model.blocks.block_size),
        scheduler,
        bytes_per_block=model.blocks.bytes_per_block,
        free=free,
        host_free=None if free is None else free_memory(),
        num_instances=num_instances if free is None else 1,
        fraction=1.0,
    )
    if communicator is not None:
        capacity = capacity.with_blocks(communicator.least(capacity.kv.num_blocks), "a rank has no more")
    log.info("%s: a pass takes %d bytes; cache: %s", device, pass_bytes, capacity.reason)
    return _runner(model, capacity, scheduler, most_tokens, communicator)


def _runner(
    model: DeviceModel,
    capacity: Capacity,
    scheduler: SchedulerConfig,
    most_tokens: int,
    communicator: Communicator | None,
) -> tuple[DeviceRunner, Capacity]:
    """A runner that is warm, with the blocks that the device really has memory for, as long as these are not too few.

    Others may have taken some since it was measured, and what is compiled first takes some that nobody measured. One of
    several ranks has what all have agreed on, or ends with the core.
    """
    wanted = capacity.kv.num_blocks
    while True:
        runner = None
        try:
            runner = _made(model, capacity, scheduler, most_tokens, communicator)
            if model.device.type == "cuda":
                runner.warm_up(scheduler.max_num_tokens)
                model.warmed_up()
            return runner, capacity
        except (OutOfMemory, torch.OutOfMemoryError) as error:
            reason = str(error)
        num_blocks = int(capacity.kv.num_blocks * SHRUNK_TO)
        if communicator is not None or num_blocks < max(1, wanted * LEAST_SHARE):
            raise OutOfMemory(f"{model.device}: not even {capacity.kv.num_blocks} of {wanted} blocks fit: {reason}")
        log.warning("%d blocks do not fit, trying %d: %s", capacity.kv.num_blocks, num_blocks, reason)
        runner = None
        gc.collect()  # a runner and its graphs hold each other: its rows and scores would lie beside the next one's
        model.blocks.free()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        capacity = capacity.with_blocks(num_blocks, f"{capacity.kv.num_blocks} did not fit")


def _made(
    model: DeviceModel,
    capacity: Capacity,
    scheduler: SchedulerConfig,
    most_tokens: int,
    communicator: Communicator | None,
) -> DeviceRunner:
    sizes: dict[str, Any] = {
        "num_blocks": capacity.kv.num_blocks,
        "num_host_blocks": capacity.kv.num_host_blocks,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_tokens": most_tokens,
        "max_model_len": capacity.max_sequence_len,
    }
    if communicator is None or communicator.place.pipeline_parallel == 1:
        return DeviceRunner(model, **sizes, is_alone=communicator is None)
    return DeviceStageRunner(model, communicator, **sizes, num_micro_batches=communicator.place.pipeline_parallel)


def _model(engine_dir: Path, device: torch.device, communicator: Communicator | None) -> tuple[DeviceModel, int]:
    """An engine's model and the longest sequence it is for. The first of several ranks verifies for all."""
    is_torch = EngineManifest.read(engine_dir).lowering == "torch"
    size = 1 if communicator is None else communicator.place.tensor_parallel
    engine = TorchLowering().opened(engine_dir) if is_torch else open_engine(engine_dir, "tensorrt", size)
    verification = Verification(engine) if communicator is None or communicator.place.rank == 0 else None
    segments = None
    if not is_torch:
        try:
            segments = load_segments(engine, engine_dir, device, communicator=communicator)
        except ConfigError as error:
            log.warning("%s; it runs on kernels of our own instead", error)
    # Not while the exception is alive: it holds weights that are on the device already.
    model = segments or KernelModel.load(engine, device, communicator=communicator)
    if verification is not None:
        verification.finish()
    return model, engine.manifest.max_model_len


def _free(device: torch.device, config: EngineConfig, pass_bytes: int, num_instances: int) -> FreeMemory | None:
    """Memory for blocks; None takes what the host has, for a device that is the host's processor.

    What is in use is what this process's allocator holds: other instances may be loading meanwhile.
    """
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    left, total = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    if config.kv.num_blocks:  # a core started again gets what the first one had, if it is there at all
        return FreeMemory(num_bytes=max(0, left - pass_bytes), source=f"left on {name}")
    utilization, used = config.kv.gpu_memory_utilization, torch.cuda.memory_reserved(device)
    share = int(total * utilization) // num_instances - used
    among = f" among {num_instances} instances" if num_instances > 1 else ""
    source = f"gpu_memory_utilization={utilization:g} of {name}{among}, {used} in use, {left} left"
    return FreeMemory(num_bytes=max(0, min(share, left) - pass_bytes - RESERVED_BYTES), source=source)
