"""From a model loaded in this process to a runner with what memory the machine has for K/V blocks."""

from __future__ import annotations

from dataclasses import replace

from pageflight.core.config import EngineConfig
from pageflight.core.manifest import EngineManifest
from pageflight.kv.capacity import Capacity, resolve_capacity
from pageflight.lowering.base import CompiledModel, Lowering
from pageflight.lowering.communicator import Communicator
from pageflight.runners.local import LocalRunner


def run_on_host(
    lowering: Lowering,
    model: CompiledModel,
    manifest: EngineManifest,
    config: EngineConfig,
    *,
    num_instances: int,
    communicator: Communicator | None = None,
) -> tuple[LocalRunner, Capacity]:
    """A runner of `model` that owns it, and its cache; the model is closed if there can be none.

    With a `communicator` the model is one rank's: the cache's size counts what all ranks of this machine hold, and
    all have as many blocks as the one that can have the fewest. Raises ConfigError for settings that cannot work.
    """
    num_ranks = communicator.shard.size if communicator is not None else 1
    try:
        if config.scheduler.deterministic:
            model = lowering.deterministic(
                model, name=manifest.title, max_num_tokens=config.scheduler.max_num_tokens + model.block_size
            )
        scheduler = replace(config.scheduler, max_model_len=min(config.scheduler.max_model_len, manifest.max_model_len))
        capacity = resolve_capacity(
            replace(config.kv, block_size=model.block_size),
            scheduler,
            bytes_per_block=model.kv_bytes_per_block * num_ranks,
            num_instances=num_instances,
        )
        if communicator is not None:
            capacity = capacity.with_blocks(communicator.least(capacity.kv.num_blocks), "a rank has no more")
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
    return runner, capacity
