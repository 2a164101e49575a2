"""A thin hand on TensorRT's network API: every layer checked, constants kept alive, dynamic sizes spelt once.

One source for the packages `tensorrt` and `tensorrt_rtx`: the module is passed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pageflight.lowering.tensorrt_plan import Dimension, TensorSpec

Tensor = Any  # ITensor: the packages bring no type hints
_DATA_TYPES = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp8": "fp8",
    "int8": "int8",
    "int4": "int4",
    "int32": "int32",
    "int64": "int64",
}


class Network:
    """One network being built. `specs` of inputs and outputs are in the order they were made.

    `arrays` are the memory of the constants by their tensor's name: it must live until the engine is built.
    """

    def __init__(self, trt: Any, builder: Any) -> None:
        self.trt = trt
        strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        self.definition = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
        self.inputs: list[TensorSpec] = []
        self.outputs: list[TensorSpec] = []
        self.arrays: dict[str, NDArray[Any]] = {}

    # --- borders ---

    def input(self, spec: TensorSpec) -> Tensor:
        shape = tuple(-1 if isinstance(extent, str) else extent for extent in spec.shape)
        tensor = _made(self.definition.add_input(spec.name, self._data_type(spec.dtype), shape), spec.name)
        for axis, extent in enumerate(spec.shape):
            if isinstance(extent, str):
                tensor.set_dimension_name(axis, extent)  # axes of one name have one size: more can be fused
        self.inputs.append(spec)
        return tensor

    def output(self, tensor: Tensor, spec: TensorSpec) -> None:
        assert tensor.dtype == self._data_type(spec.dtype), (spec, tensor.dtype)
        tensor.name = spec.name
        self.definition.mark_output(tensor)
        self.outputs.append(spec)

    def constant(self, array: NDArray[Any], dtype: str = "fp32", shape: Sequence[int] | None = None) -> Tensor:
        """A constant of `dtype` whose bits are `array`; `shape` where packing makes it another."""
        array = np.ascontiguousarray(array)
        shape = tuple(array.shape if shape is None else shape)
        weights = self.trt.Weights(self._data_type(dtype), array.ctypes.data, int(np.prod(shape, dtype=np.int64)))
        tensor = self._layer(self.definition.add_constant(shape, weights))
        tensor.name = f"constant.{len(self.arrays)}"
        self.arrays[tensor.name] = array
        return tensor

    # --- layers ---

    def cast(self, x: Tensor, dtype: str) -> Tensor:
        wanted = self._data_type(dtype)
        return x if x.dtype == wanted else self._layer(self.definition.add_cast(x, wanted))

    def elementwise(self, operation: str, a: Tensor, b: Tensor) -> Tensor:
        """SUM, PROD, DIV or MAX of two tensors of one type."""
        kind = getattr(self.trt.ElementWiseOperation, operation)
        return self._layer(self.definition.add_elementwise(a, b, kind))

    def unary(self, operation: str, x: Tensor) -> Tensor:
        return self._layer(self.definition.add_unary(x, getattr(self.trt.UnaryOperation, operation)))

    def sigmoid(self, x: Tensor) -> Tensor:
        return self._layer(self.definition.add_activation(x, self.trt.ActivationType.SIGMOID))

    def reduce(self, operation: str, x: Tensor) -> Tensor:
        """AVG or MAX over the last axis, which stays as 1."""
        kind = getattr(self.trt.ReduceOperation, operation)
        return self._layer(self.definition.add_reduce(x, kind, 1 << (len(x.shape) - 1), True))

    def gather(self, table: Tensor, rows: Tensor) -> Tensor:
        return self._layer(self.definition.add_gather(table, rows, 0))

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """One extent may be -1."""
        layer = _made(self.definition.add_shuffle(x), "shuffle")
        layer.reshape_dims = tuple(shape)
        return layer.get_output(0)

    def columns(self, x: Tensor, begin: int, count: int) -> Tensor:
        """Columns `begin` to `begin + count` of [T, features]."""
        shape = self._layer(self.definition.add_shape(x))
        only_rows = self.elementwise("PROD", shape, self.constant(np.array([1, 0], np.int64), "int64"))
        size = self.elementwise("SUM", only_rows, self.constant(np.array([0, count], np.int64), "int64"))
        layer = _made(self.definition.add_slice(x, (0, begin), (0, 0), (1, 1)), "slice")
        layer.set_input(2, size)
        return layer.get_output(0)

    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        """x [T, K] times the transpose of a matrix [N, K]."""
        plain, transposed = self.trt.MatrixOperation.NONE, self.trt.MatrixOperation.TRANSPOSE
        return self._layer(self.definition.add_matrix_multiply(x, plain, matrix, transposed))

    def rotary(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Turn the pairs (i, i + D / 2) of x [T, heads, 1, D] by rows [T, 1, D / 2]."""
        return self._layer(self.definition.add_rotary_embedding(x, cosines, sines, False, 0))

    def quantise(self, x: Tensor, scale: Tensor, dtype: str) -> Tensor:
        return self._layer(self.definition.add_quantize(x, scale, self._data_type(dtype)))

    def dequantise(self, x: Tensor, scale: Tensor, dtype: str) -> Tensor:
        """Codes × scale: one for all, one per row (rank 1), or one per group of each row (rank 2)."""
        layer = _made(self.definition.add_dequantize(x, scale, self._data_type(dtype)), "dequantize")
        if len(scale.shape) == 1 and scale.shape[0] > 1:
            layer.axis = 0
        return layer.get_output(0)

    def all_reduce(self, x: Tensor, num_ranks: int) -> Tensor:
        """The sum of every rank's x."""
        operation, how = self.trt.CollectiveOperation.ALL_REDUCE, self.trt.ReduceOperation.SUM
        layer = _made(self.definition.add_dist_collective(x, operation, how, -1, []), "collective")
        layer.num_ranks = num_ranks
        return layer.get_output(0)

    def spec(self, tensor: Tensor, name: str, dtype: str, rows: str) -> TensorSpec:
        """The description of an activation [rows, features] as it crosses a border."""
        shape: list[Dimension] = [int(extent) for extent in tensor.shape]
        assert shape[0] == -1 and -1 not in shape[1:], (name, shape)
        return TensorSpec(name=name, kind="activation", dtype=dtype, shape=(rows, *shape[1:]))

    def _data_type(self, dtype: str) -> Any:
        return getattr(self.trt, _DATA_TYPES[dtype])

    def _layer(self, layer: Any) -> Tensor:
        return _made(layer, "layer").get_output(0)


def _made(thing: Any, what: str) -> Any:
    assert thing is not None, f"TensorRT made no {what}: its log says why"
    return thing
