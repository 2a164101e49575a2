"""The decoder's operations as nodes of an OpenVINO graph, in the shapes that the CPU plugin fuses.

Shapes: T packed tokens, S sequences, N block indices, L rows of logits; activations are [T, features].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino as ov  # type: ignore[import-untyped]
from numpy.typing import NDArray
from openvino import Model, PartialShape, Shape, Tensor, Type
from openvino import opset13 as opset
from openvino.op import Constant, Parameter, _PagedAttentionExtension  # type: ignore[import-untyped]

from pageflight.models.config import DecoderConfig
from pageflight.models.rope import rope_tables
from pageflight.quant.store import WeightStore
from pageflight.quant.weight import Weight

Node = Any  # openvino.Node or openvino.Output; the package's stubs do not type its operations
_ELEMENT = {"F32": Type.f32, "BF16": Type.bf16, "I8": Type.i8, "I4": Type.i4}


class GraphOps:
    """Builds the graph of a decoder. `model(logits)` closes it.

    Constants share the memory of their arrays: `keep` must live as long as the compiled model.
    """

    def __init__(self, config: DecoderConfig, weights: WeightStore, num_positions: int) -> None:
        self._config, self._weights, self._num_positions = config, weights, num_positions
        self.keep: list[object] = [weights]
        self._parameters: list[Parameter] = []
        self._ids = self._parameter("ids", Type.i64, [-1])
        self._positions = self._parameter("positions", Type.i64, [-1])
        self._take = self._parameter("take", Type.i64, [-1])
        self._batch = [
            self._parameter(name, Type.i32, [-1])
            for name in ("past_lens", "token_begins", "block_indices", "block_begins")
        ]
        self._max_context = self._parameter("max_context_len", Type.i32, [])
        self._attention_tail: list[Node] = []

    def model(self, logits: Node) -> Model:
        """The finished graph; logits are float32 [L, V]."""
        result = opset.convert(logits, "f32")
        return Model([result], self._parameters, "decoder")

    # --- operations of the decoder ---

    def inputs(self) -> tuple[Node, Node, Node]:
        return self._ids, self._positions, self._take

    def embed(self, ids: Node, weight: str) -> Node:
        return opset.gather(self._matrix(self._weights[weight]), ids, _constant(0, np.int64))

    def take(self, x: Node, rows: Node) -> Node:
        return opset.gather(x, rows, _constant(0, np.int64))

    def rope_rows(self, positions: Node) -> tuple[Node, Node]:
        """Cosines and sines [T, 1, 1, head_dim] of the packed tokens."""
        axes = _constant([1, 2], np.int64)
        cosines, sines = (
            opset.unsqueeze(opset.gather(self._shared(table), positions, _constant(0, np.int64)), axes)
            for table in rope_tables(self._config, self._num_positions)
        )
        return cosines, sines

    def rms_norm(self, x: Node, weight: str, eps: float) -> Node:
        squares = opset.power(x, _constant([[2.0]]))
        mean = opset.reduce_mean(squares, _constant([-1], np.int64), keep_dims=True)
        inverse = opset.divide(_constant([[1.0]]), opset.sqrt(opset.add(mean, _constant([[eps]]))))
        return opset.multiply(opset.multiply(x, inverse), self._shared(self._weights[weight].float32()[None]))

    def linear(self, x: Node, weight: str, bias: str | None = None) -> Node:
        return self._product(x, self._weights[weight], None if bias is None else self._weights[bias].float32())

    def split(self, x: Node, sizes: Sequence[int]) -> list[Node]:
        return list(opset.variadic_split(x, _constant(1, np.int64), _constant(list(sizes), np.int64)).outputs())

    def rope(self, x: Node, rows: tuple[Node, Node], num_heads: int) -> Node:
        """Turn the pairs (i, i + head_dim / 2) of every head; [T, heads, 1, head_dim] is the shape the plugin fuses."""
        head_dim = self._config.head_dim
        cosines, sines = rows
        heads = opset.reshape(x, _constant([-1, num_heads, 1, head_dim], np.int64), False)
        halves = _constant([head_dim // 2, head_dim // 2], np.int64)
        first, second = opset.variadic_split(heads, _constant(3, np.int64), halves).outputs()
        turned = opset.concat([opset.multiply(second, _constant(-1.0)), first], -1)
        y = opset.add(opset.multiply(heads, cosines), opset.multiply(turned, sines))
        return opset.reshape(y, _constant([-1, num_heads * head_dim], np.int64), False)

    def paged_attention(self, layer: int, q: Node, k: Node, v: Node) -> Node:
        c = self._config
        # dynamic type and shape: the plugin chooses its cache layout, and the runtime reads it back
        caches = [self._parameter(f"{kind}.{layer}", Type.dynamic, [-1] * 4) for kind in ("key_cache", "value_cache")]
        if not self._attention_tail:
            self._attention_tail = self._fixed_attention_inputs()
        node = _PagedAttentionExtension([_output(value) for value in (q, k, v, *caches, *self._attention_tail)])
        info = node.get_rt_info()
        info["num_k_heads"] = info["num_v_heads"] = c.num_kv_heads
        info["k_head_size"] = info["v_head_size"] = c.head_dim
        return node.output(0)

    def gated_linear(self, x: Node, weight: str, bias: str | None = None) -> Node:
        """Two products, not one: swish then joins the first as a post-operation and nothing has to be split."""
        whole = self._weights[weight]
        offset = None if bias is None else self._weights[bias].float32()
        gate, up = (
            self._product(x, whole.rows(half), None if offset is None else offset[half])
            for half in _halves(whole.shape[0])
        )
        return opset.multiply(opset.swish(gate), up)

    def add(self, a: Node, b: Node) -> Node:
        return opset.add(a, b)

    # --- pieces ---

    def _fixed_attention_inputs(self) -> list[Node]:
        """Inputs 5 to 27 of PagedAttentionExtension: the batch, the scale, and every feature left unused."""

        def empty(dtype: Any = np.int32) -> Node:
            return _constant(np.zeros(0), dtype)

        zero = _constant(0, np.int32)
        unlimited_window, alibi, score_window = zero, empty(np.float32), empty()
        rotation = [empty(), empty(), empty(np.float32)]  # block indices, deltas, table
        sparse = [empty(np.float32), zero, zero]  # threshold, block size, stride
        sinks, adaptive_eviction = empty(np.float32), [zero, empty(), empty()]
        token_types, query_bias = [empty(), empty()], [empty(np.uint8), empty()]
        return [
            *self._batch,
            _constant(self._config.head_dim**-0.5),
            unlimited_window,
            alibi,
            self._max_context,
            score_window,
            *rotation,
            *sparse,
            sinks,
            *adaptive_eviction,
            *token_types,
            *query_bias,
        ]

    def _parameter(self, name: str, element: Type, shape: list[int]) -> Parameter:
        parameter = Parameter(element, PartialShape(shape))
        parameter.set_friendly_name(name)
        parameter.output(0).get_tensor().set_names({name})
        self._parameters.append(parameter)
        return parameter

    def _shared(self, array: NDArray[Any], element: Type = Type.f32, shape: Sequence[int] | None = None) -> Constant:
        """A constant of the array's memory; `shape` where it is not the array's, as of packed numbers."""
        tensor = Tensor(array, Shape(list(array.shape if shape is None else shape)), element)
        self.keep.append((array, tensor))
        return Constant(tensor)

    def _product(self, x: Node, weight: Weight, offset: NDArray[np.float32] | None) -> Node:
        y = opset.matmul(x, self._matrix(weight), False, True)
        return y if offset is None else opset.add(y, self._shared(offset[None]))

    def _matrix(self, weight: Weight) -> Node:
        """A weight as float32 [N, K] for the graph; the plugin keeps the stored form and widens it as it multiplies."""
        if weight.dtype == "F32":
            return self._shared(weight.values)
        if weight.scales is None:
            wide = opset.convert(self._shared(weight.values, _ELEMENT[weight.dtype]), "f32")
            # Without the mark the plugin keeps float32 values too, and reads them where its arithmetic is float32.
            wide.get_rt_info()["decompression_0"] = ""
            return wide
        (rows, groups), element = weight.scales.shape, _ELEMENT[weight.dtype]
        if groups == 1:
            codes = self._shared(weight.values, element, weight.shape)
            return opset.multiply(opset.convert(codes, "f32"), self._shared(weight.scales))
        grouped = self._shared(weight.values, element, (rows, groups, weight.shape[1] // groups))
        product = opset.multiply(opset.convert(grouped, "f32"), self._shared(weight.scales[:, :, None]))
        return opset.reshape(product, _constant(list(weight.shape), np.int64), False)


def _halves(count: int) -> tuple[slice, slice]:
    return slice(0, count // 2), slice(count // 2, count)


def _constant(value: Any, dtype: Any = np.float32) -> Node:
    return opset.constant(np.asarray(value, dtype))


def _output(value: Node) -> Node:
    return value if isinstance(value, ov.Output) else value.output(0)
