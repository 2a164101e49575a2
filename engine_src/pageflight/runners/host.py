"""From a model loaded in this process to a runner with what memory the machine has for K/V blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from pageflight.core.config import EngineConfig
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
    that can have the fewest."""
    scheduler = replace(config.scheduler, max_model_len=min(config.scheduler.max_model_len, manifest.max_model_len))
    bytes_per_block = model.kv_bytes_per_block
    capacity = resolve_capacity(
        replace(config.kv, block_size=model.block_size),
        scheduler,
        bytes_per_block=bytes_per_block if communicator is None else communicator.total(bytes_per_block),
        num_instances=num_instances,
    )
    if communicator is not None:
        capacity = capacity.with_blocks(communicator.least(capacity.kv.num_blocks), "a rank has no more")
    return capacity


@contextmanager
def closed_on_error(model: CompiledModel) -> Iterator[None]:
    """Close `model` where what is made of it fails."""
    try:
        yield
    except BaseException:
        model.close()
        raise
