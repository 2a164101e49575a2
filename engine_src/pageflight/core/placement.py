"""Where each engine instance of a model runs: the `placement` of its `config.pbtxt`, one item per instance."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from pageflight.core.devices import DeviceSet, Item, items_text, parse_items
from pageflight.core.errors import ConfigError

_WORDS = ("engine_dir", "gpu_memory_utilization", "kv_memory", "tensor_parallel", "pipeline_parallel")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Of one instance. What is None is the model's own parameter of that name.

    `engine_dir` is relative to the repository; `kv_memory` in bytes; `pipeline_parallel` the stages that its layers are
    cut into, `tensor_parallel` the ranks of each: every GPU of a set is one.
    """

    devices: DeviceSet
    engine_dir: str
    gpu_memory_utilization: float | None = None
    kv_memory: int | None = None
    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None

    def __post_init__(self) -> None:
        check_stated(self.devices, self.tensor_parallel, self.pipeline_parallel)


class Ranks(NamedTuple):
    """How many compute each step of an instance: `pipeline_parallel` stages of `tensor_parallel` ranks."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1


ALONE = Ranks()


def ranks_of(
    devices: DeviceSet, tensor_parallel: int | None, pipeline_parallel: int | None, default: Ranks = ALONE
) -> Ranks:
    """Of an instance for which these are stated; what is None is the `default`'s. Every GPU of a set is a rank, so
    where nobody says how many a stage has, they are shared out among the stages.

    Raises ConfigError for another number than there are GPUs in the set.
    """
    stages = default.pipeline_parallel if pipeline_parallel is None else pipeline_parallel
    size = default.tensor_parallel if tensor_parallel is None else tensor_parallel
    if devices.kind != "gpu":
        return Ranks(size, stages)
    num_gpus = len(devices.numbers)
    if tensor_parallel is None and size == 1:
        size = max(1, num_gpus // stages)
    if size * stages != num_gpus:
        raise _wrong_number(devices, size, stages)
    return Ranks(size, stages)


def check_stated(devices: DeviceSet, tensor_parallel: int | None, pipeline_parallel: int | None) -> None:
    """Raises ConfigError for numbers of which no default makes as many as there are GPUs in the set."""
    product = (tensor_parallel or 1) * (pipeline_parallel or 1)
    is_whole = tensor_parallel is not None and pipeline_parallel is not None
    num_gpus = len(devices.numbers)
    if devices.kind == "gpu" and (num_gpus % product or (is_whole and product != num_gpus)):
        raise _wrong_number(devices, tensor_parallel, pipeline_parallel)


def _wrong_number(devices: DeviceSet, tensor_parallel: int | None, pipeline_parallel: int | None) -> ConfigError:
    sizes = {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
    named = " times ".join(f"{name}={size}" for name, size in sizes.items() if (size or 1) != 1)
    num_gpus = len(devices.numbers)
    return ConfigError(
        f"{devices}: {named or 'tensor_parallel=1'}, but the set has {num_gpus} GPU{'s' if num_gpus > 1 else ''};"
        " they must be as many"
    )


def parse_placements(option: str, text: str) -> tuple[Placement, ...]:
    """Empty for an empty text: the instances are alike and share the machine. Raises ConfigError."""
    return tuple(map(_placement, parse_items(option, text, _WORDS))) if text else ()


def placements_text(placements: Iterable[Placement]) -> str:
    """The inverse of `parse_placements`."""
    return items_text(
        (
            placement.devices,
            {name: value for name in _WORDS if (value := getattr(placement, name)) is not None},
        )
        for placement in placements
    )


def number_word(item: Item, name: str) -> int | None:
    """A word that is a whole number; None where it is not there. Raises ConfigError."""
    value = item.words.get(name)
    if value is not None and not value.isdigit():
        raise ConfigError(f"{item.where}: {name}={value!r} is not a whole number")
    if name in ("tensor_parallel", "pipeline_parallel") and value is not None and int(value) < 1:
        raise ConfigError(f"{item.where}: {name}={value}: must be at least 1")
    return None if value is None else int(value)


def share_word(item: Item) -> float | None:
    """`gpu_memory_utilization` of an item. Raises ConfigError."""
    name = "gpu_memory_utilization"
    value = item.words.get(name)
    if value is None:
        return None
    try:
        share = float(value)
    except ValueError:
        raise ConfigError(f"{item.where}: {name}={value!r} is not a number") from None
    if not 0 < share <= 1:
        raise ConfigError(f"{item.where}: {name}={value}: must be above 0 and at most 1")
    return share


def _placement(item: Item) -> Placement:
    if "engine_dir" not in item.words:
        raise ConfigError(f"{item.where}: engine_dir= is missing; build it again")
    try:
        return Placement(
            devices=item.devices,
            engine_dir=item.words["engine_dir"],
            gpu_memory_utilization=share_word(item),
            kv_memory=number_word(item, "kv_memory"),
            tensor_parallel=number_word(item, "tensor_parallel"),
            pipeline_parallel=number_word(item, "pipeline_parallel"),
        )
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(item.where) else f"{item.where}: {text}") from None
