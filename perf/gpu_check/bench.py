"""What all checks of kernels share: the sizes, numbers at random, and how a result is judged and timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from perf.gpu_check.card import Card, Record, failure

BLOCK_SIZE = 32
FP8_ERROR = 4e-2
"""Relative: half a step of three bits of fraction is at most 6 %, on average less than half of that."""


class Bench:
    """Sizes of a model, or of a tiny one; `compute` is the type of activations."""

    def __init__(self, card: Card, *, is_tiny: bool) -> None:
        self.card, self.device = card, card.device
        self.compute = torch.bfloat16 if card.is_gpu else torch.float32
        self.has_fp8 = card.capability >= 89
        self.is_tiny = is_tiny
        self.hidden, self.inner = (64, 96) if is_tiny else (4096, 14_336)
        self.heads, self.kv_heads, self.head_dim = (4, 2, 16) if is_tiny else (32, 8, 128)
        self.rows, self.context = (2, 40) if is_tiny else (64, 2048)
        self.tokens = 8 if is_tiny else 2048
        self.vocab = 300 if is_tiny else 128_256
        self.most = 2e-2 if card.is_gpu else 1e-3  # relative error that rounding to `compute` may leave
        self.bandwidth: float | None = None  # measured first; None where that failed
        self.rates: dict[torch.dtype, float] = {}
        torch.manual_seed(1)

    def caches(self) -> tuple[torch.dtype, ...]:
        """Types of K/V."""
        return (self.compute, *((torch.float8_e4m3fn,) if self.has_fp8 else ()))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.compute)

    def integers(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def permutation(self, count: int) -> Tensor:
        return torch.randperm(count, device=self.device).to(torch.int32)

    def judged(self, name: str, parts: Mapping[str, tuple[Tensor, Tensor]], most: float = 0.0) -> Record:
        """The greatest relative error of the parts, each (found, expected) in any types, and which have too much."""
        errors = {part: _error(found, expected) for part, (found, expected) in parts.items()}
        wrong = [f"{part} {error:.2e}" for part, error in errors.items() if not error <= most]
        complaint = f"relative error {', '.join(wrong)}, at most {most:g}"
        return {"name": name, "error": max(errors.values()), **failure(complaint, unless=not wrong)}

    def timed(
        self, call: Callable[[], object], moved: int = 0, operations: int = 0, kind: torch.dtype = torch.bfloat16
    ) -> Record:
        """Of a call that moves so many bytes: its time, and shares of the card's ceilings."""
        seconds = self.card.seconds(call)
        record: Record = {"us": round(seconds * 1e6, 2)}
        if moved and self.bandwidth is not None:
            record["of_bandwidth"] = round(moved / seconds / self.bandwidth, 3)
        if operations and kind in self.rates:
            record["of_rate"] = round(operations / seconds / self.rates[kind], 3)
        return record


def _error(found: Tensor, expected: Tensor) -> float:
    """NaN where a number is none."""
    assert found.shape == expected.shape, f"shape {list(found.shape)}, not {list(expected.shape)}"
    norm = float(expected.double().norm())
    return float((found.double() - expected.double()).norm()) / (norm or 1.0)
