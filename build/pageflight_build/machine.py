"""Choices that follow from the machine: which precision its cores multiply natively."""

from __future__ import annotations

from pathlib import Path

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Feature names of the first core; empty where the system does not tell."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), frozenset())


def default_dtype(flags: frozenset[str]) -> str:
    """bf16 where the cores have it; elsewhere it would be emulated, slower than fp32."""
    return "bf16" if flags & BF16_FLAGS else "fp32"
