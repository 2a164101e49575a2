"""From a model loaded in this process to a runner with what memory the machine has for K/V blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from pageflight.core.config import EngineConfig, KVConfig
from pageflight.core.manifest import EngineManifest
from pageflight.kv.capacity import Capacity, resolve_capacity
from pageflight.lowering.base import CompiledModel, Lowering
from pageflight.lowering.communicator import Communicator
from pageflight.runners.local import LocalRunner


class BlockSizes(Protocol):
    """What a cache is laid out by."""

    block_size: int
    kv_bytes_per_block: int


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

    With a `communicator` the model is that of one of several ranks. Raises ConfigError for settings that cannot work.
    """
    with closed_on_error(model):
        if config.scheduler.deterministic:
            model = lowering.deterministic(
                model, name=manifest.title, max_num_tokens=config.scheduler.max_num_tokens + model.block_size
            )
        capacity = capacity_on_host(model, manifest, config, num_instances, communicator)
        runner = LocalRunner(
            model,
            num_blocks=capacity.kv.num_blocks,
            num_host_blocks=capacity.kv.num_host_blocks,
            max_num_seqs=config.scheduler.max_num_seqs,
            max_model_len=capacity.max_sequence_len,
            deterministic=config.scheduler.deterministic,
        )
    return runner, capacity


def capacity_on_host(
    model: BlockSizes,
    manifest: EngineManifest,
    config: EngineConfig,
    num_instances: int,
    communicator: Communicator | None = None,
) -> Capacity:
    """What this machine has for the cache. Its size counts what all ranks hold, and all have as many blocks as the one
    that can have the fewest. Of the sizes that were asked for a machine has the part of its ranks, and its memory is
    for those alone."""
    scheduler = replace(config.scheduler, max_model_len=min(config.scheduler.max_model_len, manifest.max_model_len))
    of_machines = [model.kv_bytes_per_block]
    machine = 0
    if communicator is not None:
        machine = communicator.place.rank * config.num_nodes // communicator.place.num_ranks
        of_machines = [
            communicator.total(model.kv_bytes_per_block if each == machine else 0) for each in range(config.num_nodes)
        ]
    own_bytes, all_bytes = of_machines[machine], sum(of_machines)
    capacity = resolve_capacity(
        replace(share(config.kv, own_bytes, all_bytes), block_size=model.block_size),
        scheduler,
        bytes_per_block=own_bytes,
        num_instances=num_instances,
    )
    capacity = replace(capacity, num_bytes=capacity.kv.num_blocks * all_bytes)
    if communicator is not None:
        capacity = capacity.with_blocks(communicator.least(capacity.kv.num_blocks), "a rank has no more")
    return capacity


def share(kv: KVConfig, own_bytes: int, all_bytes: int) -> KVConfig:
    """What a rank, or a machine, has of the bytes that were asked for: of a block it has `own_bytes` of `all_bytes`."""
    memory, host_memory = (size * own_bytes // all_bytes for size in (kv.memory_bytes, kv.host_memory_bytes))
    return replace(kv, memory_bytes=memory, host_memory_bytes=host_memory)


@contextmanager
def closed_on_error(model: CompiledModel) -> Iterator[None]:
    """Close `model` where what is made of it fails."""
    try:
        yield
    except BaseException:
        model.close()
        raise
