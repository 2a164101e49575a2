"""Amounts as people write them: memory with its unit, GPUs by their compute capability."""

from __future__ import annotations

import re

from pageflight.core.errors import ConfigError


def parse_capabilities(text: str) -> tuple[int, ...]:
    """Compute capabilities of "89,120", of "8.9 12.0" or of nothing, in rising order. Raises ConfigError else."""
    parts = [part.replace(".", "") for part in text.replace(",", " ").split()]
    if not all(re.fullmatch(r"[0-9]{2,3}", part) for part in parts):
        raise ConfigError(f"compute_capability={text!r}: write numbers such as 89,120")
    return tuple(sorted({int(part) for part in parts}))


def parse_bytes(text: str) -> int:
    """Bytes of "4GiB", "512MiB", "3e9" or "0". Raises ConfigError for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([KMGT]i?)?B?\s*", text, re.IGNORECASE)
    if not match:
        raise ConfigError(f"{text!r} is not an amount of memory; write for example 4GiB, 512MiB or a number of bytes")
    unit = (match[2] or "").upper()
    power = " KMGT".index(unit[0]) if unit else 0
    return int(float(match[1]) * (1024 if unit.endswith("I") else 1000) ** power)
