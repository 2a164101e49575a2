"""How a model is divided among cards: by heads and features inside a machine, by layers across machines.

Both splits are those that the engine makes (`pageflight.models.sharding`, `pageflight.models.stages`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pageflight.core.errors import ConfigError
from pageflight.models.config import DecoderConfig
from pageflight.models.sharding import Shard, Split, check_size

CARDS_PER_MACHINE = 8
MOST_CARDS = 64
"""Beyond so many no plan looks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """`pipeline` stages of `tensor_parallel` ranks each, on `nodes` machines with as many whole stages each."""

    tensor_parallel: int = 1
    pipeline: int = 1
    nodes: int = 1

    @property
    def num_cards(self) -> int:
        return self.tensor_parallel * self.pipeline


def shares_out(config: DecoderConfig, size: int, unit: int) -> bool:
    """Whether `size` ranks can share every layer. `unit`: inputs that share a scale."""
    try:
        check_size(config, size, unit)
    except ConfigError:
        return False
    return True


def rank_config(config: DecoderConfig, size: int, unit: int) -> DecoderConfig:
    """The decoder of the rank that holds most. Its vocabulary is whole: every rank has all logits."""
    ranks = (Shard(rank=rank, size=size) for rank in range(size))
    decoders = (Split(config=config, shard=shard, input_unit=unit).rank_config for shard in ranks)
    return max(decoders, key=lambda decoder: decoder.num_parameters)


def layout_of(config: DecoderConfig, unit: int, num_cards: int, num_machines: int = 0) -> Layout | None:
    """`num_cards` cards on so many machines, or on the fewest there can be: as many ranks as a machine can have and the
    heads allow, the rest by layers."""
    together = num_cards // num_machines if num_machines else num_cards
    most = together if num_machines else min(together, CARDS_PER_MACHINE)
    for size in range(most, 0, -1):
        if together % size or not shares_out(config, size, unit):
            continue
        stages = num_cards // size
        if stages > config.num_layers:
            return None
        return Layout(tensor_parallel=size, pipeline=stages, nodes=num_machines or _fewest_machines(size, stages))
    return None


def _fewest_machines(size: int, stages: int) -> int:
    """That share whole stages of `size` cards alike."""
    return next(n for n in range(1, stages + 1) if stages % n == 0 and stages // n * size <= CARDS_PER_MACHINE)


def layouts(config: DecoderConfig, unit: int) -> Iterator[Layout]:
    """What to try, fewest cards first: ranks of one machine, then machines full of ranks."""
    sizes = [n for n in range(1, CARDS_PER_MACHINE + 1) if shares_out(config, n, unit)]
    for size in sizes:
        yield Layout(tensor_parallel=size)
    for stages in range(2, min(config.num_layers, MOST_CARDS // sizes[-1]) + 1):
        yield Layout(tensor_parallel=sizes[-1], pipeline=stages, nodes=_fewest_machines(sizes[-1], stages))
