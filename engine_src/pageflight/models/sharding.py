"""What one of several ranks holds of a decoder: its heads, its part of the MLP, its rows of the vocabulary.

The split is Megatron's (Shoeybi et al., Megatron-LM, 2019): `qkv` and `gate_up` are cut by outputs, `output` and `down`
by inputs, so that two sums over ranks per layer are all that ranks tell each other between the embedding and the head,
which are cut by rows of the vocabulary. Norms are everybody's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

from pageflight.core.errors import ConfigError
from pageflight.models.config import DecoderConfig
from pageflight.models.weights import EMBED, HEAD, LayerNames, bias_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One of `size` ranks, counted from 0."""

    rank: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The part of a weight [N, K] that a rank reads: stacked runs of outputs (none: all), of all or some inputs."""

    rows: tuple[slice, ...] = ()
    columns: slice | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How `config` is cut for `shard`. `input_unit`: inputs that share a scale. The MLP is cut between such groups
    if it has enough of them, else between any two that do not share a byte.

    Raises ConfigError, naming the sizes that work, for one that does not.
    """

    config: DecoderConfig
    shard: Shard
    input_unit: int = 1

    def __post_init__(self) -> None:
        check_size(self.config, self.shard.size, self.input_unit)
        assert 0 <= self.shard.rank < self.shard.size

    @property
    def rank_config(self) -> DecoderConfig:
        """The decoder that a rank runs. The vocabulary stays whole: every rank has the logits of all of it."""
        columns = self._intermediate
        return replace(
            self.config,
            num_heads=self.config.num_heads // self.shard.size,
            num_kv_heads=len(self._kv_heads),
            intermediate_size=columns.stop - columns.start,
        )

    @property
    def vocabulary(self) -> slice:
        """The ids whose rows of embedding and head a rank holds. The last rank may have fewer."""
        count = rows_per_rank(self.config.vocab_size, self.shard.size)
        begin = self.shard.rank * count
        return slice(begin, min(self.config.vocab_size, begin + count))

    @property
    def sums(self) -> frozenset[str]:
        """The weights cut by inputs: their products are parts of a sum over ranks."""
        return frozenset(name for name, cut in self.cuts().items() if cut.columns is not None)

    def cuts(self) -> dict[str, Cut]:
        """The cut of every weight that is cut, by name; a rank holds the others whole."""
        c = self.config
        heads, inner, vocabulary = self._heads, self._intermediate, Cut(rows=(self.vocabulary,))
        keys = [_scaled(slice(head, head + 1), c.head_dim, c.q_size) for head in self._kv_heads]
        values = [slice(part.start + c.kv_size, part.stop + c.kv_size) for part in keys]
        qkv = Cut(rows=_joined((heads, *keys, *values)))
        gate_up = Cut(rows=_joined((inner, _scaled(inner, 1, c.intermediate_size))))
        found = {EMBED: vocabulary, HEAD: vocabulary}
        for layer in range(c.num_layers):
            names = LayerNames.of(layer)
            found |= {names.qkv: qkv, bias_name(names.qkv): qkv, names.output: Cut(columns=heads)}
            found |= {names.gate_up: gate_up, bias_name(names.gate_up): gate_up, names.down: Cut(columns=inner)}
        return found

    @property
    def _heads(self) -> slice:
        """The query features of this rank."""
        count = self.config.q_size // self.shard.size
        return slice(self.shard.rank * count, (self.shard.rank + 1) * count)

    @property
    def _kv_heads(self) -> tuple[int, ...]:
        """The K/V head of each run of this rank's queries: runs are as long as no border of a group comes between.

        Heads are replicated where there are fewer than ranks, and where a group of queries does not fit a rank.
        """
        count, group = self.config.num_heads // self.shard.size, self.config.num_heads // self.config.num_kv_heads
        begin = self.shard.rank * count
        return tuple(query // group for query in range(begin, begin + count, gcd(count, group)))

    @property
    def _intermediate(self) -> slice:
        size, rank, unit = self.shard.size, self.shard.rank, self.input_unit
        if self.config.intermediate_size // unit < size:
            unit = gcd(unit, 2)
        units = self.config.intermediate_size // unit
        return slice(rank * units // size * unit, (rank + 1) * units // size * unit)


def rows_per_rank(vocab_size: int, size: int) -> int:
    """The rows of the vocabulary that a rank holds, but perhaps the last one."""
    return -(-vocab_size // size)


def check_size(config: DecoderConfig, size: int, input_unit: int = 1) -> None:
    """Raises ConfigError, naming the sizes that work, where `config` cannot be cut for `size` ranks."""
    reason = _obstacle(config, size, input_unit)
    if reason is not None:
        works = [str(n) for n in range(1, config.num_heads + 1) if _obstacle(config, n, input_unit) is None]
        raise ConfigError(f"tensor_parallel={size}: {reason}; sizes that work are {', '.join(works)}")


def _obstacle(config: DecoderConfig, size: int, unit: int) -> str | None:
    if size < 1:
        return "must be at least 1"
    if config.num_heads % size:
        return f"must divide num_heads={config.num_heads}"
    if size == 1:
        return None
    if config.intermediate_size // gcd(unit, 2) < size:
        return f"intermediate_size={config.intermediate_size} is too small for so many"
    if (size - 1) * rows_per_rank(config.vocab_size, size) >= config.vocab_size:
        return f"vocab_size={config.vocab_size} is too small for so many"
    return None


def _scaled(part: slice, unit: int, offset: int) -> slice:
    return slice(offset + part.start * unit, offset + part.stop * unit)


def _joined(parts: tuple[slice, ...]) -> tuple[slice, ...]:
    """Neighbours as one."""

    def runs() -> Iterator[slice]:
        begin, end = parts[0].start, parts[0].stop
        for part in parts[1:]:
            if part.start != end:
                yield slice(begin, end)
                begin = part.start
            end = part.stop
        yield slice(begin, end)

    return tuple(runs())
