"""Where each engine instance of a model runs: the `placement` of its `config.pbtxt`, one item per instance."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pageflight.core.devices import DeviceSet, Item, items_text, parse_items
from pageflight.core.errors import ConfigError

_WORDS = ("engine_dir", "gpu_memory_utilization", "kv_memory", "tensor_parallel")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Of one instance. What is None is the model's own parameter of that name.

    `engine_dir` is relative to the repository; `kv_memory` in bytes; `tensor_parallel` the ranks that compute each step
    together: every GPU of a set is one.
    """

    devices: DeviceSet
    engine_dir: str
    gpu_memory_utilization: float | None = None
    kv_memory: int | None = None
    tensor_parallel: int | None = None

    def __post_init__(self) -> None:
        num_ranks(self.devices, self.tensor_parallel)


def num_ranks(devices: DeviceSet, stated: int | None, default: int = 1) -> int:
    """How many compute each step of an instance: every GPU of a set, else what is `stated` for it, or the `default`.

    Raises ConfigError for another number than there are GPUs in the set.
    """
    if devices.kind != "gpu":
        return default if stated is None else stated
    num_gpus = len(devices.numbers)
    wanted = stated if stated is not None else default if default != 1 else num_gpus
    if wanted != num_gpus:
        raise ConfigError(
            f"{devices}: tensor_parallel={wanted}, but the set has {num_gpus} GPU{'s' if num_gpus > 1 else ''};"
            " they must be as many"
        )
    return num_gpus


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
    if name == "tensor_parallel" and value is not None and int(value) < 1:
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
        )
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(item.where) else f"{item.where}: {text}") from None
