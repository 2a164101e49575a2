"""What `--instances` asks for: how many engine instances, or which devices each one has and what differs in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from pageflight.core.devices import DeviceSet, Item, items_text, parse_items
from pageflight.core.errors import ConfigError
from pageflight.core.placement import check_stated, number_word, share_word
from pageflight_build.amounts import parse_bytes, parse_capabilities

if TYPE_CHECKING:
    from pageflight_build.options import EngineOptions

OPTION = "instances"
MOST = 64
_TENSORRT_WORDS = ("flavor", "compute_capability", "weights", "collectives")
_ENGINE_WORDS = ("engine", "dtype", "kv_dtype", "group_size", *_TENSORRT_WORDS)
_RANK_WORDS = ("tensor_parallel", "pipeline_parallel")
WORDS = (*_ENGINE_WORDS, "gpu_memory_utilization", "kv_memory", *_RANK_WORDS)
FIRST_FOLDER = "1/artifacts"


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSpec:
    """One engine instance. `overrides`: engine options of the build that it has otherwise, by name, as they were
    written; `gpu_memory_utilization`, `kv_memory` and numbers of ranks and stages that are None are the build's."""

    devices: DeviceSet
    overrides: tuple[tuple[str, str], ...] = ()
    gpu_memory_utilization: float | None = None
    kv_memory: int | None = None
    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None

    def __str__(self) -> str:
        words: dict[str, object] = dict(self.overrides)
        for name in ("gpu_memory_utilization", "kv_memory", *_RANK_WORDS):
            if getattr(self, name) is not None:
                words[name] = getattr(self, name)
        return items_text([(self.devices, words)])

    def engine_options(self, base: EngineOptions) -> EngineOptions:
        """`base` with what this instance has otherwise. Raises ConfigError naming the instance."""
        changes: dict[str, Any] = dict(self.overrides)
        if "group_size" in changes:
            changes["group_size"] = int(changes["group_size"])
        if "compute_capability" in changes:
            changes["compute_capability"] = parse_capabilities(changes["compute_capability"])
        if changes.get("engine", base.engine) != "tensorrt":  # what only that has does not follow to another
            changes = {item.name: item.default for item in fields(base) if item.name in _TENSORRT_WORDS} | changes
        try:
            options = replace(base, **changes)
        except ConfigError as error:
            raise ConfigError(f"{OPTION}: {str(self)!r}: {error}") from None
        wrong = {"gpu": "openvino", "cpu": "tensorrt"}.get(self.devices.kind)
        if options.engine == wrong:
            raise ConfigError(f"{OPTION}: {str(self)!r}: engine={wrong!r} does not run on {self.devices.kind}s")
        return options


def parse_instances(text: str) -> tuple[InstanceSpec, ...]:
    """The instances of `3` (alike, sharing the machine) or of `gpu0; gpu1 dtype=bf16; cpu:0-3 engine=openvino`.

    Raises ConfigError naming the item and what is allowed, and for devices that two instances would have: a GPU may be
    named by several if each says its `gpu_memory_utilization`, which together are at most 1.
    """
    if text.strip().lstrip("-").isdigit():
        count = int(text)
        if not 1 <= count <= MOST:
            raise ConfigError(f"{OPTION}={count}: must be at least 1, and at most {MOST}, which fit one server")
        return (InstanceSpec(devices=DeviceSet()),) * count
    instances = tuple(map(_instance, parse_items(OPTION, text, WORDS)))
    if len(instances) > MOST:
        raise ConfigError(f"{OPTION}: {len(instances)} instances; at most {MOST} fit one server")
    _check_sharing(instances)
    return instances


def instances_text(instances: Sequence[InstanceSpec]) -> str:
    """The inverse of `parse_instances`."""
    if all(instance.devices.kind == "any" for instance in instances):
        return str(len(instances))
    return "; ".join(map(str, instances))


def engine_folder(options: EngineOptions, num_ranks: int, first: tuple[EngineOptions, int]) -> str:
    """Where the engine of these options for so many ranks lies in its model's folder; `first`: those of the first
    instance."""
    if (options, num_ranks) == first:
        return FIRST_FOLDER
    key = hashlib.sha256(json.dumps([asdict(options), num_ranks], sort_keys=True).encode()).hexdigest()[:8]
    return f"{FIRST_FOLDER}-{key}"


def _instance(item: Item) -> InstanceSpec:
    words = item.words
    if not words.get("group_size", "0").isdigit():
        raise ConfigError(f"{item.where}: group_size={words['group_size']!r} is not a whole number")
    try:
        tensor_parallel, pipeline_parallel = (number_word(item, name) for name in _RANK_WORDS)
        check_stated(item.devices, tensor_parallel, pipeline_parallel)
        kv_memory = parse_bytes(words["kv_memory"]) if "kv_memory" in words else None
        parse_capabilities(words.get("compute_capability", ""))
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(item.where) else f"{item.where}: {text}") from None
    if "gpu_memory_utilization" in words and item.devices.kind != "gpu":
        raise ConfigError(f"{item.where}: gpu_memory_utilization= is of GPUs")
    return InstanceSpec(
        devices=item.devices,
        overrides=tuple((name, words[name]) for name in _ENGINE_WORDS if name in words),
        gpu_memory_utilization=share_word(item),
        kv_memory=kv_memory,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
    )


def _check_sharing(instances: Sequence[InstanceSpec]) -> None:
    for one, other in combinations(instances, 2):
        if not one.devices.overlaps(other.devices):
            continue
        where = f"{OPTION}: {str(one.devices)!r} and {str(other.devices)!r}"
        if one.devices.kind != "gpu":
            raise ConfigError(f"{where} share cores; give each its own")
        if one.gpu_memory_utilization is None or other.gpu_memory_utilization is None:
            raise ConfigError(f"{where} share a GPU: give both their part of it, such as gpu_memory_utilization=0.45")
