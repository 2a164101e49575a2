"""How a model is divided among cards: by heads and features inside a machine, by layers across machines.

The tensor-parallel split is Megatron's (Shoeybi et al., Megatron-LM, 2019): every rank has its heads, its part of the
MLP and its rows of the vocabulary, and all of the norms. K/V heads are replicated where there are fewer than ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

from pageflight.models.config import DecoderConfig

CARDS_PER_MACHINE = 8
MOST_CARDS = 64
"""Beyond so many no plan looks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """`pipeline` stages of `tensor_parallel` ranks each."""

    tensor_parallel: int = 1
    pipeline: int = 1

    @property
    def num_cards(self) -> int:
        return self.tensor_parallel * self.pipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Neighbouring layers; the first stage has the embedding, the last one the final norm and the head."""

    num_layers: int
    is_first: bool
    is_last: bool


def stages_of(num_layers: int, pipeline: int) -> tuple[Stage, ...]:
    """As even as can be; earlier stages have the layers that remain, for the last one has the head."""
    each, more = divmod(num_layers, pipeline)
    return tuple(
        Stage(num_layers=each + (index < more), is_first=index == 0, is_last=index == pipeline - 1)
        for index in range(pipeline)
    )


def input_unit(dtype: str, group_size: int) -> int:
    """Inputs that share a scale, or a byte, and stay on one rank."""
    return group_size or (2 if dtype == "int4" else 1)


def tensor_parallel_obstacle(config: DecoderConfig, size: int, unit: int) -> str | None:
    """Why `size` ranks cannot share the model; None where they can."""
    if size == 1:
        return None
    if config.num_heads % size:
        return f"{size} does not divide {config.num_heads} heads"
    if config.q_size // size % unit:
        return f"{size} ranks would cut groups of {unit} inputs that share a scale, of {config.q_size} query features"
    rows = -(-config.vocab_size // size)
    if config.intermediate_size // unit < size or (size - 1) * rows >= config.vocab_size:
        return f"the model is too small for {size} ranks"
    return None


def rank_config(config: DecoderConfig, size: int, unit: int) -> DecoderConfig:
    """The decoder of the rank that holds most. Its vocabulary is whole: every rank has all logits."""
    if size == 1:
        return config
    heads, group = config.num_heads // size, config.num_heads // config.num_kv_heads
    return replace(
        config,
        num_heads=heads,
        num_kv_heads=heads // gcd(heads, group),
        intermediate_size=-(-(config.intermediate_size // unit) // size) * unit,
    )


def layout_of(config: DecoderConfig, unit: int, num_cards: int) -> Layout | None:
    """`num_cards` cards: as many ranks as a machine can have and the heads allow, the rest by layers."""
    for size in range(min(num_cards, CARDS_PER_MACHINE), 0, -1):
        if num_cards % size or tensor_parallel_obstacle(config, size, unit):
            continue
        stages = num_cards // size
        return Layout(tensor_parallel=size, pipeline=stages) if stages <= config.num_layers else None
    return None


def layouts(config: DecoderConfig, unit: int) -> Iterator[Layout]:
    """What to try, fewest cards first: ranks of one machine, then machines full of ranks."""
    sizes = [n for n in range(1, CARDS_PER_MACHINE + 1) if tensor_parallel_obstacle(config, n, unit) is None]
    for size in sizes:
        yield Layout(tensor_parallel=size)
    for stages in range(2, min(config.num_layers, MOST_CARDS // sizes[-1]) + 1):
        yield Layout(tensor_parallel=sizes[-1], pipeline=stages)
