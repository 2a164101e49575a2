"""What a Triton model instance is told at start: its `config.pbtxt` and where it lies."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pageflight.core.devices import DeviceSet
from pageflight.core.errors import ConfigError
from pageflight.core.placement import Placement, parse_placements


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """One instance of one Triton model. `server_pid` is tritonserver's: a stub's parent. `gpu`: where Triton has placed
    it, None if on none."""

    name: str
    version: str
    repository: Path
    instance: int
    num_instances: int
    gpu: int | None = None
    is_batched: bool
    outputs: frozenset[str]
    parameters: Mapping[str, str]
    server_pid: int

    @classmethod
    def read(cls, args: Mapping[str, str]) -> ModelSettings:
        """From the arguments of `initialize`. Raises ConfigError for what was edited into something unreadable."""
        config: dict[str, Any] = json.loads(args["model_config"])
        groups = config.get("instance_group", [])
        device = args.get("model_instance_device_id", "") if args.get("model_instance_kind") == "GPU" else ""
        return cls(
            name=args["model_name"],
            version=args["model_version"],
            repository=Path(args["model_repository"]).parent,
            instance=_number_of(args["model_instance_name"], groups),
            num_instances=sum(map(_count, groups)) or 1,
            gpu=int(device) if device else None,
            is_batched=int(config.get("max_batch_size", 0)) > 0,
            outputs=frozenset(output["name"] for output in config.get("output", ())),
            parameters={
                name: str(entry.get("string_value", "")) for name, entry in config.get("parameters", {}).items()
            },
            server_pid=os.getppid(),
        )

    def text(self, name: str) -> str:
        """A parameter that must be there."""
        try:
            return self.parameters[name]
        except KeyError:
            raise ConfigError(f"config.pbtxt of {self.name}: parameter {name!r} is missing; build it again") from None

    def number(self, name: str, minimum: int) -> int:
        value = self.text(name)
        try:
            number = int(value)
        except ValueError:
            raise ConfigError(f"config.pbtxt of {self.name}: {name}={value!r} is not a whole number") from None
        if number < minimum:
            raise ConfigError(f"config.pbtxt of {self.name}: {name}={number}: must be at least {minimum}")
        return number

    def real(self, name: str) -> float:
        value = self.text(name)
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f"config.pbtxt of {self.name}: {name}={value!r} is not a number") from None

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.text(name)
        if value not in choices:
            raise ConfigError(f"config.pbtxt of {self.name}: {name}={value!r}: supported are {', '.join(choices)}")
        return value

    def flag(self, name: str) -> bool:
        value = self.text(name)
        if value not in ("true", "false"):
            raise ConfigError(f"config.pbtxt of {self.name}: {name}={value!r}: must be true or false")
        return value == "true"

    @property
    def placement(self) -> Placement:
        """Of this instance; what Triton says of its GPU goes before what the file says. Raises ConfigError."""
        option = f"config.pbtxt of {self.name}: placement"
        placements = parse_placements(option, self.text("placement"))
        if len(placements) not in (0, self.num_instances):
            raise ConfigError(f"{option} has {len(placements)} items, but there are {self.num_instances} instances")
        found = placements[self.instance] if placements else None
        found = found or Placement(devices=DeviceSet(), engine_dir=self.text("engine_dir"))
        return found if self.gpu is None else replace(found, devices=DeviceSet("gpu", (self.gpu,)))

    @property
    def num_beside(self) -> int:
        """Instances, this one with them, that share the machine's memory: those on GPUs have their own."""
        placements = parse_placements("placement", self.text("placement"))
        if self.placement.devices.kind == "gpu":
            return 1
        return sum(other.devices.kind != "gpu" for other in placements) or self.num_instances

    @property
    def engine_dir(self) -> Path:
        """Absolute path of the engine directory; the parameter is relative to the repository."""
        return self.repository / self.text("engine_dir")


def _number_of(instance_name: str, groups: Sequence[Mapping[str, Any]]) -> int:
    """An instance's number among all of its model. Triton calls it by its group's name and its number in that."""
    group_name, _, number = instance_name.rpartition("_")
    if not number.isdigit():
        raise ConfigError(f"model_instance_name={instance_name!r}: must end with the instance's number")
    if len(groups) < 2:
        return int(number)
    names = [str(group.get("name", "")) for group in groups]
    if names.count(group_name) != 1:
        raise ConfigError(f"model_instance_name={instance_name!r}: no single instance_group of {', '.join(names)}")
    return sum(map(_count, groups[: names.index(group_name)])) + int(number)


def _count(group: Mapping[str, Any]) -> int:
    """Instances of a group, which has its count of them on each of its GPUs."""
    return int(group.get("count", 1)) * max(1, len(group.get("gpus", ())))
