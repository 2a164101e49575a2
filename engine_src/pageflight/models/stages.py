"""A decoder cut by its layers into stages, which run one after another, each where its weights are.

The first stage has the embedding, the last one the final norm and the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from pageflight.core.errors import ConfigError
from pageflight.models.config import DecoderConfig
from pageflight.models.sharding import Shard
from pageflight.models.weights import EMBED, HEAD, expected_shapes, layer_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Layers `begin` to `end` (not included) of `num_layers`."""

    begin: int
    end: int
    num_layers: int

    @property
    def is_first(self) -> bool:
        return self.begin == 0

    @property
    def is_last(self) -> bool:
        return self.end == self.num_layers

    def names(self, config: DecoderConfig) -> tuple[str, ...]:
        """The weights of the whole `config` that this stage reads; a tied head may be stored as the embedding."""
        return tuple(name for name in {**expected_shapes(config), HEAD: ()} if self._reads(name))

    def _reads(self, name: str) -> bool:
        layer = layer_of(name)
        if layer is not None:
            return self.begin <= layer < self.end
        return self.is_first if name == EMBED else self.is_last


def whole(config: DecoderConfig) -> Stage:
    """All of it: the only stage."""
    return Stage(begin=0, end=config.num_layers, num_layers=config.num_layers)


def check_stages(config: DecoderConfig, num_stages: int) -> None:
    """Raises ConfigError where `config` cannot be cut into so many stages."""
    if num_stages < 1:
        raise ConfigError(f"pipeline_parallel={num_stages}: must be at least 1")
    if num_stages > config.num_layers:
        raise ConfigError(
            f"pipeline_parallel={num_stages}: each stage needs a layer, num_layers={config.num_layers} are here"
        )


def check_engine(lowering: str, tensor_parallel: int, pipeline_parallel: int) -> None:
    """Raises ConfigError, by its name, for a lowering that has no ranks."""
    for name, size in (("tensor_parallel", tensor_parallel), ("pipeline_parallel", pipeline_parallel)):
        if size > 1 and lowering != "torch":
            raise ConfigError(f"{name}={size}: only engine torch runs on several ranks, not {lowering}")


def cut_stages(layer_bytes: Sequence[int], *, first_bytes: int, last_bytes: int, num_stages: int) -> tuple[Stage, ...]:
    """`num_stages` runs of layers so that the largest has as few bytes as can be, and then the others are as even.

    `first_bytes`: of the embedding; `last_bytes`: of final norm and head. There is a layer for every stage.
    """
    num_layers = len(layer_bytes)
    assert 1 <= num_stages <= num_layers, "checked before"
    sums = [first_bytes]
    for size in layer_bytes:
        sums.append(sums[-1] + size)
    sums[0], sums[-1] = 0, sums[-1] + last_bytes

    @cache
    def best(begin: int, left: int) -> tuple[int, int, tuple[int, ...]]:
        """The largest stage of the layers from `begin`, the squares of all, and where they end."""
        if left == 1:
            size = sums[num_layers] - sums[begin]
            return size, size * size, (num_layers,)
        found = []
        for end in range(begin + 1, num_layers - left + 2):
            size, (largest, squares, ends) = sums[end] - sums[begin], best(end, left - 1)
            found.append((max(size, largest), size * size + squares, (end, *ends)))
        return min(found)

    _, _, ends = best(0, num_stages)
    begins = (0, *ends[:-1])
    return tuple(Stage(begin=b, end=e, num_layers=num_layers) for b, e in zip(begins, ends, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one of all ranks stands, counted from 0: ranks of a stage are neighbours."""

    rank: int
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def stage(self) -> int:
        """Index of its stage."""
        return self.rank // self.tensor_parallel

    @property
    def shard(self) -> Shard:
        """Its part of the stage."""
        return Shard(rank=self.rank % self.tensor_parallel, size=self.tensor_parallel)
