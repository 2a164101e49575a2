"""Who shares an engine, and how: weights, quotas and K/V budgets by tenant, as an operator writes them in a file.

```json
{
  "default": {"max_waiting": 100},
  "tenants": {"shop": {"weight": 3, "kv_share": 0.5}, "batch": {"weight": 0.5, "max_running": 8}}
}
```

What a tenant does not name it takes from `default`, and tenants that are not named are `default` each.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pageflight.core.errors import ConfigError

MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000.0
MAX_COUNT = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantShare:
    """`weight` is of the policy `fair`: twice the weight, twice the tokens while both have requests waiting.

    `max_waiting` and `max_running` count sequences, None is no limit of its own. `kv_share` is the part of the K/V
    blocks that its running sequences may need at their full length; 1 is no limit.
    """

    weight: float = 1.0
    max_waiting: int | None = None
    max_running: int | None = None
    kv_share: float = 1.0

    def __post_init__(self) -> None:
        if not MIN_WEIGHT <= self.weight <= MAX_WEIGHT:
            raise ConfigError(f"weight={self.weight}: must be {MIN_WEIGHT} to {MAX_WEIGHT:g}")
        if self.max_waiting is not None and not 0 <= self.max_waiting <= MAX_COUNT:
            raise ConfigError(f"max_waiting={self.max_waiting}: must be 0 to {MAX_COUNT}")
        if self.max_running is not None and not 1 <= self.max_running <= MAX_COUNT:
            raise ConfigError(f"max_running={self.max_running}: must be 1 to {MAX_COUNT}")
        if not 0 < self.kv_share <= 1:
            raise ConfigError(f"kv_share={self.kv_share}: must be above 0 and at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenants:
    """The shares of all tenants."""

    default: TenantShare = TenantShare()
    by_name: dict[str, TenantShare] = field(default_factory=dict)

    def share_of(self, name: str) -> TenantShare:
        return self.by_name.get(name, self.default)


def parse_tenants(text: str) -> Tenants:
    """The content of a tenants file (JSON). Raises ConfigError with the place, the value and its limit."""
    try:
        data = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}") from None
    entries = _entries("the file", data, ("default", "tenants"))
    default = _share("default", entries.get("default", {}), TenantShare())
    named = _entries("tenants", entries.get("tenants", {}), None)
    return Tenants(
        default=default, by_name={name: _share(f"tenants.{name}", item, default) for name, item in named.items()}
    )


def read_tenants(path: Path) -> Tenants:
    """The tenants file at `path`. Raises ConfigError that names it."""
    try:
        return parse_tenants(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"tenants={path}: {error.strerror or error}") from None
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"tenants={path}: {error}") from None


_KINDS: dict[str, tuple[type, ...]] = {
    "weight": (int, float),
    "max_waiting": (int, type(None)),
    "max_running": (int, type(None)),
    "kv_share": (int, float),
}
assert set(_KINDS) == {item.name for item in fields(TenantShare)}


def _share(place: str, data: object, default: TenantShare) -> TenantShare:
    entries = _entries(place, data, tuple(_KINDS))
    for name, value in entries.items():
        if type(value) not in _KINDS[name]:
            kind = "a number" if float in _KINDS[name] else "a whole number or null"
            raise ConfigError(f"{place}.{name}={value!r}: must be {kind}")
    try:
        return replace(default, **entries)
    except ConfigError as error:
        raise ConfigError(f"{place}.{error}") from None


def _entries(place: str, data: object, names: tuple[str, ...] | None) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ConfigError(f"{place}: must be a JSON object")
    unknown = [name for name in data if names is not None and name not in names]
    if names is not None and unknown:
        raise ConfigError(f"{place}: {unknown[0]!r} is not known; use {', '.join(names)}")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    for name in entries:
        if not name.isprintable():  # half a surrogate pair among them, which nothing could store
            raise ConfigError(f"{name!r} has characters that cannot be printed")
    if len(entries) < len(pairs):
        names = [name for name, _value in pairs]
        raise ConfigError(f"{next(name for name in names if names.count(name) > 1)!r} appears twice")
    return entries
