"""A decoder cut by its layers into stages, which run one after another, each where its weights are.

The first stage has the embedding, the last one the final norm and the head.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import get_args

from pageflight.core.config import EngineConfig, LauncherName
from pageflight.core.errors import ConfigError
from pageflight.models.config import DecoderConfig
from pageflight.models.sharding import Shard
from pageflight.models.weights import EMBED, HEAD, expected_shapes, layer_of

MAX_RANK_WAIT_S = 1200.0
"""A start may take half an hour, and loading has its part of it."""


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


def check_nodes(config: EngineConfig) -> None:
    """Raises ConfigError for machines, and ways to start ranks on them, that cannot work."""
    num_ranks, num_nodes = config.tensor_parallel * config.pipeline_parallel, config.num_nodes
    if config.launcher not in get_args(LauncherName):
        raise ConfigError(f"launcher={config.launcher!r}: supported are {', '.join(get_args(LauncherName))}")
    if num_nodes < 1:
        raise ConfigError(f"nodes={num_nodes}: must be at least 1")
    if config.launcher == "local" and num_nodes > 1:
        raise ConfigError(f"nodes={num_nodes}: launcher local starts ranks on this machine only; use external or ray")
    if config.launcher != "local" and num_ranks == 1:
        raise ConfigError(f"launcher={config.launcher!r}: there are no ranks to start; give tensor_parallel a size")
    if num_ranks % num_nodes:
        raise ConfigError(
            f"nodes={num_nodes}: must divide the {num_ranks} ranks (tensor_parallel={config.tensor_parallel} x"
            f" pipeline_parallel={config.pipeline_parallel})"
        )
    if not 0 < config.rank_port < 1 << 16:
        raise ConfigError(f"rank_port={config.rank_port}: must be from 1 to 65535")
    if not 0 < config.rank_wait_s <= MAX_RANK_WAIT_S:
        raise ConfigError(f"rank_wait_s={config.rank_wait_s}: must be above 0 and at most {MAX_RANK_WAIT_S:g}")


def cut_stages(layer_bytes: Sequence[int], *, first_bytes: int, last_bytes: int, num_stages: int) -> tuple[Stage, ...]:
    """`num_stages` runs of layers so that the largest has as few bytes as can be; within that, each has as nearly as
    can be an even share of what is left.

    `first_bytes`: of the embedding; `last_bytes`: of final norm and head. There is a layer for every stage.
    """
    num_layers = len(layer_bytes)
    assert 1 <= num_stages <= num_layers, "checked before"
    sums = [0, *accumulate(layer_bytes)]  # before each layer, and after the last
    sums = [0, *(first_bytes + size for size in sums[1:])]
    sums[-1] += last_bytes

    def fits(begin: int, left: int, largest: int) -> bool:
        """Whether so many stages of at most `largest` hold the layers from `begin`. Fewer that do can be cut again."""
        if num_layers - begin < left:
            return False
        while begin < num_layers and left:
            begin, before, left = bisect_right(sums, sums[begin] + largest) - 1, begin, left - 1
            if begin == before:
                return False
        return begin == num_layers

    largest = bisect_left(range(sums[-1]), True, key=lambda size: fits(0, num_stages, size))
    ends, begin = [], 0
    for left in range(num_stages, 0, -1):
        share, most = (sums[-1] - sums[begin]) / left, sums[begin] + largest
        valid = (
            end
            for end in range(begin + 1, num_layers + 1)
            if sums[end] <= most and (fits(end, left - 1, largest) if left > 1 else end == num_layers)
        )
        begin = min(valid, key=lambda end, begin=begin, share=share: abs(sums[end] - sums[begin] - share))  # type: ignore[misc]
        ends.append(begin)
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
