"""The names of a decoder's weights, and how each is made from tensors of a checkpoint."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from pageflight.models.config import DecoderConfig

EMBED = "embed"
FINAL_NORM = "norm"
HEAD = "head"


class Role(enum.Enum):
    """What a weight does; the precision it is stored in follows from it."""

    TABLE = "table"  # rows are looked up
    LINEAR = "linear"  # [out, in], multiplies activations
    VECTOR = "vector"  # norms and biases


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of a checkpoint and the shape it must have."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One weight of the definition: its sources stacked along axis 0."""

    name: str
    role: Role
    sources: tuple[Source, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(source.shape[0] for source in self.sources), *self.sources[0].shape[1:])


@dataclass(frozen=True, slots=True)
class LayerNames:
    """Weight names of one layer, the same for every family."""

    input_norm: str
    qkv: str
    output: str
    post_norm: str
    gate_up: str
    down: str

    @classmethod
    def of(cls, layer: int) -> LayerNames:
        prefix = f"layers.{layer}."
        return cls(*(prefix + part for part in ("input_norm", "qkv", "output", "post_norm", "gate_up", "down")))


def bias_name(weight: str) -> str:
    return weight + ".bias"


def layer_of(name: str) -> int | None:
    """The layer that a weight belongs to; None for those outside of layers."""
    head, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if head == "layers" else None


def expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every weight the definition reads, by name. A tied head is listed under `embed` only."""
    c = config
    shapes: dict[str, tuple[int, ...]] = {EMBED: (c.vocab_size, c.hidden_size), FINAL_NORM: (c.hidden_size,)}
    if not c.tied_head:
        shapes[HEAD] = (c.vocab_size, c.hidden_size)
    for layer in range(c.num_layers):
        names = LayerNames.of(layer)
        shapes[names.input_norm] = shapes[names.post_norm] = (c.hidden_size,)
        linears = (
            (names.qkv, c.q_size + 2 * c.kv_size, c.hidden_size, c.qkv_bias),
            (names.output, c.hidden_size, c.q_size, c.output_bias),
            (names.gate_up, 2 * c.intermediate_size, c.hidden_size, c.mlp_bias),
            (names.down, c.hidden_size, c.intermediate_size, c.mlp_bias),
        )
        for name, rows, columns, has_bias in linears:
            shapes[name] = (rows, columns)
            if has_bias:
                shapes[bias_name(name)] = (rows,)
    return shapes
