"""Typed reading of a Hugging Face `config.json`: every entry is checked, and every refusal names entry and value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pageflight.core.errors import CheckpointError
from pageflight.models.config import RopeConfig

MAX_CONFIG_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Entries:
    """The entries of one JSON object, with the file they came from for error messages."""

    path: Path
    data: Mapping[str, Any]

    def refuse(self, name: str, supported: str) -> CheckpointError:
        """The error for an entry whose value cannot be served."""
        return CheckpointError(f"{self.path}: {name}={self.data.get(name)!r}: {supported}")

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.data.get(name)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.refuse(name, f"must be an integer of at least {least}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.data.get(name)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise self.refuse(name, "must be a positive number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.data.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(name, "must be true or false")
        return value

    def token_id(self, name: str, vocab_size: int) -> int | None:
        """One token id or None; -1, which some checkpoints write for none, is None."""
        value = self.data.get(name)
        if value is None or value == -1:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
            raise self.refuse(name, f"must be a token id from 0 to {vocab_size - 1}")
        return value

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """Token ids given as one number, as a list, or not at all."""
        value = self.data.get(name)
        if isinstance(value, list):
            ids = [Entries(self.path, {name: item}).token_id(name, vocab_size) for item in value]
        else:
            ids = [self.token_id(name, vocab_size)]
        return tuple(token for token in ids if token is not None)


def read_entries(path: Path) -> Entries:
    """Read a JSON object from `path`. Raises CheckpointError when it is missing, too large or not an object."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, limit {MAX_CONFIG_BYTES}")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a checkpoint is a folder with config.json and safetensors") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not a JSON object")
    return Entries(path, data)


def read_rope(entries: Entries, max_positions: int) -> RopeConfig:
    """Rotary settings in the spelling of transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`)."""
    name = "rope_parameters" if entries.data.get("rope_parameters") else "rope_scaling"
    raw = entries.data.get(name) or {}
    if not isinstance(raw, dict):
        raise entries.refuse(name, "must be an object")
    scaling = Entries(entries.path, raw)
    theta = scaling.number("rope_theta", entries.number("rope_theta", 10000.0))
    for owner in (entries, scaling):
        if owner.data.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
            raise owner.refuse("partial_rotary_factor", "supported is 1.0, rotation of whole heads")
    kind = raw.get("rope_type", raw.get("type", "default"))
    supported = "supported rope types are default, linear and llama3"
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=scaling.number("factor"))
    if kind == "llama3":
        rope = RopeConfig(
            theta=theta,
            scaling="llama3",
            factor=scaling.number("factor"),
            low_freq_factor=scaling.number("low_freq_factor"),
            high_freq_factor=scaling.number("high_freq_factor"),
            original_max_positions=scaling.integer("original_max_position_embeddings", max_positions),
        )
        if rope.high_freq_factor <= rope.low_freq_factor:
            raise scaling.refuse("high_freq_factor", f"must be above low_freq_factor={rope.low_freq_factor}")
        return rope
    raise CheckpointError(f"{entries.path}: {name}.rope_type={kind!r}: {supported}")
