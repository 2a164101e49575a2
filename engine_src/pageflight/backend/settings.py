"""What a Triton model instance is told at start: its `config.pbtxt` and where it lies."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pageflight.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """One instance of one Triton model. `server_pid` is tritonserver's: a stub's parent."""

    name: str
    version: str
    repository: Path
    instance: int
    num_instances: int
    is_batched: bool
    outputs: frozenset[str]
    parameters: Mapping[str, str]
    server_pid: int

    @classmethod
    def read(cls, args: Mapping[str, str]) -> ModelSettings:
        """From the arguments of `initialize`. Raises ConfigError for what was edited into something unreadable."""
        config: dict[str, Any] = json.loads(args["model_config"])
        number = args["model_instance_name"].rpartition("_")[2]
        if not number.isdigit():
            raise ConfigError(
                f"model_instance_name={args['model_instance_name']!r}: must end with the instance's number"
            )
        groups = config.get("instance_group", [])
        if len(groups) > 1:
            raise ConfigError(f"instance_group of {args['model_name']}: write one group with a count")
        return cls(
            name=args["model_name"],
            version=args["model_version"],
            repository=Path(args["model_repository"]).parent,
            instance=int(number),
            num_instances=sum(int(group.get("count", 1)) for group in groups) or 1,
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

    def flag(self, name: str) -> bool:
        value = self.text(name)
        if value not in ("true", "false"):
            raise ConfigError(f"config.pbtxt of {self.name}: {name}={value!r}: must be true or false")
        return value == "true"

    @property
    def engine_dir(self) -> Path:
        """Absolute path of the engine directory; the parameter is relative to the repository."""
        return self.repository / self.text("engine_dir")
