"""What must hold at the end of a soak: each check has a value, a limit, and can fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Check:
    """`value` must be at most `limit`."""

    name: str
    value: float
    limit: float
    detail: str = ""

    @property
    def is_ok(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        sign = "ok    " if self.is_ok else "FAILED"
        return f"{sign} {self.name}: {self.value:g} (limit {self.limit:g}){': ' + self.detail if self.detail else ''}"


def nothing(name: str, found: Mapping[str, object] | list[str] | set[str] | frozenset[str]) -> Check:
    """There must be none; what there is, is named."""
    return Check(name, len(found), 0, "; ".join(map(str, sorted(found)[:5])))
