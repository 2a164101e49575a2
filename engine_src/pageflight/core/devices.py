"""Sets of devices as text: `gpu0`, `gpu2,3`, `cpu`, `cpu:0-3`; and lists of items that begin with one."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from pageflight.core.errors import ConfigError

DeviceKind = Literal["any", "gpu", "cpu"]

_FORM = "write gpu0, gpu2,3, cpu, cpu:0-3 or cpu:0,2"
_NUMBERS = re.compile(r"[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*")
_MOST = 4096


@dataclass(frozen=True, slots=True)
class DeviceSet:
    """What one engine instance runs on.

    `gpu`: the GPUs of these numbers, as its server counts them. `cpu`: the processor, on the cores of these numbers, or
    on all of them where there are none. `any`: whatever its engine finds, beside other instances.
    """

    kind: DeviceKind = "any"
    numbers: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> DeviceSet:
        """Raises ConfigError for what is no set of devices."""
        for kind in ("gpu", "cpu"):
            if text.startswith(kind):
                numbers = text.removeprefix(kind).removeprefix(":")
                if kind == "cpu" and text == "cpu":
                    return cls("cpu")
                if kind == "cpu" and not text.startswith("cpu:"):
                    break
                return cls("gpu" if kind == "gpu" else "cpu", _parse_numbers(text, numbers))
        raise ConfigError(f"{text!r} is no set of devices; {_FORM}")

    def __str__(self) -> str:
        if not self.numbers:
            return self.kind
        return f"cpu:{_ranges(self.numbers)}" if self.kind == "cpu" else f"gpu{','.join(map(str, self.numbers))}"

    @property
    def name(self) -> str:
        """The same for a name: without commas and colons."""
        return str(self).replace(":", "").replace(",", "_")

    def overlaps(self, other: DeviceSet) -> bool:
        """Whether a device is in both. `cpu` and `any` share all cores, so they overlap with sets of cores alone."""
        if "gpu" in (self.kind, other.kind):
            return self.kind == other.kind and not set(self.numbers).isdisjoint(other.numbers)
        if self.numbers and other.numbers:
            return not set(self.numbers).isdisjoint(other.numbers)
        return bool(self.numbers or other.numbers)


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a list: its devices and its `key=value` words. `where` begins an error about it."""

    devices: DeviceSet
    words: Mapping[str, str]
    where: str


def parse_items(option: str, text: str, allowed: Collection[str]) -> tuple[Item, ...]:
    """The items of a list separated by `;`. Raises ConfigError naming the item and what is allowed."""
    items = []
    for number, part in enumerate(text.split(";"), 1):
        where = f"{option}: item {number} {part.strip()!r}"
        first, *words = part.split() or [""]
        try:
            devices = DeviceSet.parse(first)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        found: dict[str, str] = {}
        for word in words:
            key, has_value, value = word.partition("=")
            if key not in allowed or not has_value or not value:
                raise ConfigError(f"{where}: {word!r} is not understood; allowed are {'=, '.join(allowed)}=")
            if key in found:
                raise ConfigError(f"{where}: {key}= stands twice")
            found[key] = value
        items.append(Item(devices, found, where))
    return tuple(items)


def items_text(items: Iterable[tuple[DeviceSet, Mapping[str, object]]]) -> str:
    """The inverse of `parse_items`."""
    return "; ".join(
        " ".join([str(devices), *(f"{key}={value}" for key, value in words.items())]) for devices, words in items
    )


def _parse_numbers(text: str, numbers: str) -> tuple[int, ...]:
    if not _NUMBERS.fullmatch(numbers):
        raise ConfigError(f"{text!r} is no set of devices; {_FORM}")
    found: list[int] = []
    for part in numbers.split(","):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if high >= _MOST or high < low:
            raise ConfigError(f"{text!r}: {part} must rise and stay below {_MOST}")
        found += range(low, high + 1)
    if len(set(found)) != len(found):
        raise ConfigError(f"{text!r} names a device twice")
    return tuple(sorted(found))


def _ranges(numbers: tuple[int, ...]) -> str:
    """`0-3,6` of rising numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
