"""The decoder's operations as layers of TensorRT networks, cut in segments where attention stands.

The definition is written as one program; `paged_attention` ends a network and begins the next. A value that is used
behind the cut becomes an output of the network that made it and an input of the one that uses it. Sums over ranks are
other cuts of the same kind, or layers.

Shapes: T packed tokens, L rows of logits, N outputs, K inputs, D head_dim; activations are [T, features].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pageflight.lowering.tensorrt_network import Network, Tensor
from pageflight.lowering.tensorrt_plan import ROWS, TOKENS, TensorSpec
from pageflight.lowering.tensorrt_ranks import Joint
from pageflight.models.config import DecoderConfig
from pageflight.models.rope import rope_tables
from pageflight.models.weights import HEAD
from pageflight.quant.float8 import E4M3_LIMIT, SMALLEST_PEAK
from pageflight.quant.forms import WeightForm, input_scale_name, scale_name

_STORED = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8", "I8": "int8", "I4": "int4"}
_STEP_INPUTS = {"ids": TOKENS, "positions": TOKENS, "take": ROWS}
_RESIDUAL = "residual"


class StoredTensors(Protocol):
    """Where constants come from: `WeightStore`, or what stands in for it."""

    def tensor(self, name: str) -> NDArray[Any]: ...


@dataclass(slots=True, eq=False)
class Cut:
    """One network on the way to be a segment, behind `num_attentions`; `tensors` are its inputs by name."""

    network: Network
    num_attentions: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A tensor of one segment, of packed tokens or of the rows that sample. `name` where it has one of its own: inputs
    of the step, and rows of rotary tables."""

    cut: Cut | None
    tensor: Tensor
    name: str = ""
    rows: str = TOKENS


class TensorRtOps:
    """Builds the networks of a decoder; `finish(logits)` closes the last one.

    Weights are network inputs, unless `constants` has them. Those of layer n are called `this.` behind attention n and
    `next.` before it, so that all networks between two attentions are the same one. `joint`: how one of several ranks,
    whose decoder `config` and `forms` are, meets the others; its logits are of its rows of the vocabulary.
    """

    def __init__(
        self,
        trt: Any,
        builder: Any,
        config: DecoderConfig,
        forms: Mapping[str, WeightForm],
        *,
        activations: str,
        num_positions: int,
        constants: StoredTensors | None = None,
        joint: Joint | None = None,
    ) -> None:
        self._trt, self._builder, self._config, self._forms = trt, builder, config, forms
        self._activations, self._num_positions, self._constants = activations, num_positions, constants
        self._joint, self._rows = joint, TOKENS
        self.cuts = [Cut(Network(trt, builder))]

    def finish(self, logits: Value) -> list[Network]:
        """All networks in the order they run; logits are float32 [L, V], or a rank's columns of them."""
        network = self._network
        shape = (ROWS, self._forms[HEAD].shape[0])
        spec = TensorSpec(name="logits", kind="activation", dtype="fp32", shape=shape)
        network.output(network.cast(self._here(logits), "fp32"), spec)
        return [cut.network for cut in self.cuts]

    # --- operations of the decoder ---

    def inputs(self) -> tuple[Value, Value, Value]:
        """Nothing yet: an input belongs to the segments that use it."""
        ids, positions, take = (Value(None, None, name) for name in _STEP_INPUTS)
        return ids, positions, take

    def embed(self, ids: Value, weight: str) -> Value:
        table = self._weight(weight, self._forms[weight].dtype, self._forms[weight].shape)
        rows = self._network.cast(self._network.gather(table, self._here(ids)), self._activations)
        if self._joint is None:
            return self._value(rows)
        here = self._input("here", "step", self._activations, (TOKENS, 1))
        return self._summed(self._network.elementwise("PROD", rows, here), _RESIDUAL)

    def take(self, x: Value, rows: Value) -> Value:
        """The first that is taken is of the last layer: what comes after it is for those rows only."""
        tensor = self._network.gather(self._here(x), self._here(rows))
        self._rows = ROWS
        return self._value(tensor)

    def rope_rows(self, positions: Value) -> tuple[Value, Value]:
        """Cosines and sines [T, D / 2] of the packed tokens."""
        network, half = self._network, self._config.head_dim // 2
        tables = None
        if self._constants is not None:
            tables = [network.constant(table[:, :half]) for table in rope_tables(self._config, self._num_positions)]
        rows = []
        for index, name in enumerate(("cosines", "sines")):
            shape = (self._num_positions, half)
            table = self._input(f"rope.{name}", "table", "fp32", shape) if tables is None else tables[index]
            row = network.cast(network.gather(table, self._here(positions)), self._activations)
            rows.append(Value(self.cuts[-1], row, name))
        return rows[0], rows[1]

    def rms_norm(self, x: Value, weight: str, eps: float) -> Value:
        """Computed in float32 and rounded once."""
        network = self._network
        wide = network.cast(self._here(x), "fp32")
        mean = network.reduce("AVG", network.elementwise("PROD", wide, wide))
        root = network.unary(
            "SQRT", network.elementwise("SUM", mean, network.constant(np.full((1, 1), eps, np.float32)))
        )
        normed = network.elementwise("PROD", network.elementwise("DIV", wide, root), self._vector(weight))
        return self._value(network.cast(normed, self._activations))

    def linear(self, x: Value, weight: str, bias: str | None = None) -> Value:
        y = self._value(self._product(self._here(x), weight))
        if self._joint is not None and weight in self._joint.sums:
            y = self._summed(y.tensor, "sum")
        if bias is None:
            return y
        network = self._network
        return self._value(network.elementwise("SUM", y.tensor, network.cast(self._vector(bias), self._activations)))

    def split(self, x: Value, sizes: Sequence[int]) -> Sequence[Value]:
        tensor, begins = self._here(x), np.cumsum([0, *sizes[:-1]]).tolist()
        return [
            self._value(self._network.columns(tensor, begin, size)) for begin, size in zip(begins, sizes, strict=True)
        ]

    def rope(self, x: Value, rows: tuple[Value, Value], num_heads: int) -> Value:
        network, head_dim = self._network, self._config.head_dim
        cosines, sines = (network.reshape(self._here(row), (-1, 1, head_dim // 2)) for row in rows)
        heads = network.reshape(self._here(x), (-1, num_heads, 1, head_dim))
        turned = network.rotary(heads, cosines, sines)
        return self._value(network.reshape(turned, (-1, num_heads * head_dim)))

    def paged_attention(self, layer: int, q: Value, k: Value, v: Value) -> Value:
        """The end of a segment. What comes back is an input of the next one."""
        assert layer == self.cuts[-1].num_attentions, "layers come in order"
        for name, value in (("q", q), ("k", k), ("v", v)):
            self._output(value, name)
        self._begin(layer + 1)
        return self._value(self._input("attended", "activation", self._activations, (TOKENS, self._config.q_size)))

    def gated_linear(self, x: Value, weight: str, bias: str | None = None) -> Value:
        network, both = self._network, self.linear(x, weight, bias)
        half = self._forms[weight].shape[0] // 2
        gate, up = (value.tensor for value in self.split(both, (half, half)))
        return self._value(network.elementwise("PROD", network.elementwise("PROD", gate, network.sigmoid(gate)), up))

    def add(self, a: Value, b: Value) -> Value:
        return self._value(self._network.elementwise("SUM", self._here(a), self._here(b)))

    # --- segments ---

    @property
    def _network(self) -> Network:
        return self.cuts[-1].network

    def _value(self, tensor: Tensor) -> Value:
        return Value(self.cuts[-1], tensor, rows=self._rows)

    def _begin(self, num_attentions: int) -> None:
        """The next network."""
        self.cuts.append(Cut(Network(self._trt, self._builder), num_attentions))

    def _summed(self, part: Tensor, name: str) -> Value:
        """The sum of all ranks' `part`: a layer, or an input called `name` of the next network."""
        assert self._joint is not None
        if self._joint.inside:
            return self._value(self._network.all_reduce(part, self._joint.size))
        self._output(self._value(part), "part")
        self._begin(self.cuts[-1].num_attentions)
        tensor = self._input(name, "activation", self._activations, (self._rows, int(part.shape[1])))
        return Value(self.cuts[-1], tensor, name if name == _RESIDUAL else "", self._rows)

    def _here(self, value: Value) -> Tensor:
        """The tensor of `value` in the network that is being built."""
        if value.cut is self.cuts[-1]:
            return value.tensor
        if value.cut is None:
            return self._input(value.name, "step", "int32", (_STEP_INPUTS[value.name],))
        name = value.name or _RESIDUAL
        if name == _RESIDUAL:
            num_crossed = self.cuts[-1].num_attentions - value.cut.num_attentions
            assert num_crossed <= 1, "an activation is carried over one attention, not further"
        known = self.cuts[-1].tensors.get(name)
        if known is None:
            made = value.name or "next_residual"
            if made != _RESIDUAL and made not in (spec.name for spec in value.cut.network.outputs):
                self._output(value, made)
            known = self._input(name, "activation", self._activations, (value.rows, int(value.tensor.shape[1])))
        return known

    def _output(self, value: Value, name: str) -> None:
        assert value.cut is not None
        network = value.cut.network
        network.output(value.tensor, network.spec(value.tensor, name, self._activations, value.rows))

    def _input(self, name: str, kind: str, dtype: str, shape: tuple[int | str, ...]) -> Tensor:
        tensors = self.cuts[-1].tensors
        if name not in tensors:
            tensors[name] = self._network.input(TensorSpec(name=name, kind=kind, dtype=dtype, shape=shape))
        return tensors[name]

    # --- weights ---

    def _weight(self, name: str, stored: str, shape: tuple[int, ...]) -> Tensor:
        """A stored tensor as it is: an input, or a constant."""
        if self._constants is None:
            return self._input(relative_name(name, self.cuts[-1].num_attentions), "weight", _STORED[stored], shape)
        tensors = self.cuts[-1].tensors
        if name not in tensors:
            array = self._constants.tensor(name)
            tensors[name] = self._network.constant(array, _STORED[stored], shape)
        return tensors[name]

    def _vector(self, name: str) -> Tensor:
        """Float32 [1, N]."""
        (length,) = self._forms[name].shape
        return self._network.reshape(self._weight(name, "F32", (length,)), (1, length))

    def _product(self, x: Tensor, weight: str) -> Tensor:
        """x [T, K] times a weight [N, K], in the precision of the activations; x is rounded first where its form is so.

        Layers that quantise want scales that are constants, and one for all tokens. Scales that are neither divide
        what goes in and multiply what comes out: of a token, for a weight in e4m3 (Yao et al., ZeroQuant, 2022), and,
        where weights are inputs, those of the outputs and of a calibration.
        """
        network, form = self._network, self._forms[weight]
        matrix, factors = self._matrix(weight)
        if form.input_scale or form.dtype == "F8_E4M3":
            wide = network.cast(x, "fp32")
            if form.input_scale and self._constants is not None:
                scale = self._weight(input_scale_name(weight), "F32", (1,))
            else:
                scale = self._one()
                if form.input_scale:
                    divisors = network.reshape(self._weight(input_scale_name(weight), "F32", (1,)), (1, 1))
                else:
                    divisors = self._peaks(wide)
                wide = network.elementwise("DIV", wide, divisors)
                factors.append(divisors)
            codes = network.quantise(wide, scale, _STORED[form.dtype])
            x = network.dequantise(codes, scale, self._activations)
        y = network.product(x, matrix)
        for factor in factors:
            y = network.elementwise("PROD", network.cast(y, "fp32"), factor)
        return network.cast(y, self._activations)

    def _matrix(self, name: str) -> tuple[Tensor, list[Tensor]]:
        """A weight [N, K] in the precision of the activations, and what multiplies its product: float32 [1, N]."""
        network, form = self._network, self._forms[name]
        stored = self._weight(name, form.dtype, form.shape)
        if form.scales is None:
            return network.cast(stored, self._activations), []
        rows, groups = form.scales
        by_group = form.dtype == "I4" or groups > 1
        scale = self._weight(scale_name(name), "F32", (rows, groups) if by_group else (rows,))
        if self._constants is None and not by_group:
            matrix = network.dequantise(stored, self._one(), self._activations)
            return matrix, [network.reshape(scale, (1, rows))]
        if form.dtype == "I4":  # its scales must be of the type that comes out
            scale = network.cast(scale, self._activations)
        return network.dequantise(stored, scale, self._activations), []

    def _peaks(self, wide: Tensor) -> Tensor:
        """What divides each token so that its largest number is the largest of e4m3: float32 [T, 1]."""
        network = self._network
        peaks = network.reduce("MAX", network.unary("ABS", wide))
        peaks = network.elementwise("MAX", peaks, network.constant(np.full((1, 1), SMALLEST_PEAK, np.float32)))
        return network.elementwise("DIV", peaks, network.constant(np.full((1, 1), E4M3_LIMIT, np.float32)))

    def _one(self) -> Tensor:
        return self._network.constant(np.ones(1, np.float32))


def relative_name(weight: str, num_attentions: int) -> str:
    """The name of a weight's input, in the segment before which `num_attentions` attentions ran."""
    for prefix, layer in (("this.", num_attentions - 1), ("next.", num_attentions)):
        if weight.startswith(f"layers.{layer}."):
            return prefix + weight.removeprefix(f"layers.{layer}.")
    assert not weight.startswith("layers."), weight
    return weight


def stored_name(name: str, num_attentions: int) -> str:
    """The weight that an input stands for: the inverse of `relative_name`."""
    for prefix, layer in (("this.", num_attentions - 1), ("next.", num_attentions)):
        if name.startswith(prefix):
            return f"layers.{layer}." + name.removeprefix(prefix)
    return name
