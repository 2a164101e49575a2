"""The published rule of thumb, and what it says of a model of which only the size is known."""

from __future__ import annotations

from dataclasses import dataclass

from pageflight.core.errors import ConfigError
from pageflight_build.plan.cards import KNOWN, Card, Cards
from pageflight_build.plan.layouts import CARDS_PER_MACHINE, MOST_CARDS

DTYPE_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "fp8": 8, "int8": 8, "int4": 4}


def published_rule_bytes(num_parameters: float, num_bits: int) -> float:
    """The rule that the field passes on: M = P · 4 / (32 / Q) · 1.2, for P parameters of Q bits.

    4 bytes are 32 bits; the fifth on top stands for everything that is not weights. 70 · 10^9 parameters of 16 bits
    give 168 · 10^9 bytes. (Stoelinga, "Calculating GPU memory for serving LLMs", 2023.)
    """
    return num_parameters * 4 / (32 / num_bits) * 1.2


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeFit:
    """So many cards by the rule. `decode_alone_tokens_s`: their bandwidth by the weights."""

    card: Card
    num_cards: int
    holds: bool
    missing_bytes: int
    decode_alone_tokens_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SizePlan:
    """A plan without shapes: the rule stands for K/V and everything else."""

    num_parameters: float
    dtype: str
    gpu_memory_utilization: float
    given: SizeFit | None
    fits: tuple[SizeFit, ...]

    @property
    def weight_bytes(self) -> int:
        return int(self.num_parameters * DTYPE_BITS[self.dtype] / 8)

    @property
    def rule_bytes(self) -> float:
        return published_rule_bytes(self.num_parameters, DTYPE_BITS[self.dtype])

    @property
    def holds(self) -> bool:
        return self.given.holds if self.given is not None else bool(self.fits)


def plan_by_size(num_parameters: float, dtype: str, cards: Cards | None, gpu_memory_utilization: float) -> SizePlan:
    """Raises ConfigError for a size that is none, and for a precision that is not known."""
    if not 0 < num_parameters < 1e15:
        raise ConfigError(f"parameters={num_parameters:g}: must be above 0 and below 1e15; 70e9 are 70 billion")
    if dtype not in DTYPE_BITS:
        raise ConfigError(f"dtype={dtype!r}: supported are {', '.join(DTYPE_BITS)}")

    def fit(card: Card, num_cards: int) -> SizeFit:
        left = num_cards * card.memory_bytes * gpu_memory_utilization - published_rule_bytes(
            num_parameters, DTYPE_BITS[dtype]
        )
        weights, bandwidth = num_parameters * DTYPE_BITS[dtype] / 8, card.bandwidth_bytes_s
        return SizeFit(
            card=card,
            num_cards=num_cards,
            holds=left >= 0,
            missing_bytes=max(0, int(-left)),
            decode_alone_tokens_s=None if bandwidth is None else num_cards * bandwidth / weights,
        )

    def fewest(card: Card) -> SizeFit | None:
        counts = [1, 2, 4, *range(CARDS_PER_MACHINE, MOST_CARDS + 1, CARDS_PER_MACHINE)] if card.kind == "gpu" else [1]
        return next((found for count in counts if (found := fit(card, count)).holds), None)

    looked_at = [card for card in KNOWN.values() if card.kind == "gpu"] if cards is None else [cards.card]
    given = None
    if cards is not None:
        given = fit(cards.card, cards.count if cards.card.kind == "gpu" else 1)
    found = [fewest(card) for card in looked_at]
    return SizePlan(
        num_parameters=num_parameters,
        dtype=dtype,
        gpu_memory_utilization=gpu_memory_utilization,
        given=given,
        fits=tuple(one for one in found if one is not None),
    )
