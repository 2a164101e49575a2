"""Walks a TensorRT network layer by layer in torch: what an engine would compute, and what it is compared with.

Every output is compared with the type and shape that the network declares for it, so a wrong guess about a layer shows
where it was made. int4 is held unpacked, as int8. With `wide` float64, only what the
network quantises is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pageflight.lowering.tensorrt_network import Network
from pageflight.lowering.tensorrt_plan import Segment
from pageflight.quant.int4 import unpack_int4

TORCH_TYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
    "int4": torch.int8,
    "int32": torch.int32,
    "int64": torch.int64,
}
_UNARY: dict[str, Callable[..., Tensor]] = {"SQRT": torch.sqrt, "ABS": torch.abs}
_ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    "SUM": torch.add,
    "PROD": torch.mul,
    "DIV": torch.div,
    "MAX": torch.maximum,
}
_REDUCE: dict[str, Callable[..., Tensor]] = {"AVG": torch.mean, "MAX": torch.amax}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_BY_NAME = {
    "FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "FP8": "fp8", "INT8": "int8", "INT4": "int4", "INT32": "int32",
    "INT64": "int64",
}  # fmt: skip
_CLASSES = {
    "CONSTANT": "IConstantLayer", "GATHER": "IGatherLayer", "CAST": "ICastLayer", "UNARY": "IUnaryLayer",
    "ELEMENTWISE": "IElementWiseLayer", "REDUCE": "IReduceLayer", "ACTIVATION": "IActivationLayer",
    "SHUFFLE": "IShuffleLayer", "SHAPE": "IShapeLayer", "SLICE": "ISliceLayer",
    "MATRIX_MULTIPLY": "IMatrixMultiplyLayer", "QUANTIZE": "IQuantizeLayer", "DEQUANTIZE": "IDequantizeLayer",
    "ROTARY_EMBEDDING": "IRotaryEmbeddingLayer", "DIST_COLLECTIVE": "IDistCollectiveLayer",
}  # fmt: skip


def tensor_of(array: np.ndarray, dtype: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """Stored bits as a torch tensor of `dtype`."""
    if dtype == "int4":
        array = unpack_int4(array)
    made = torch.from_numpy(np.array(array))
    if made.dtype != TORCH_TYPES[dtype]:
        made = made.view(TORCH_TYPES[dtype])
    return made if shape is None else made.reshape(shape)


class Walk:
    """One network, ready to be computed again and again on `device`, in `wide` instead of its own floats if given.

    `all_reduce` gives the sum of every rank's tensor, for networks with such layers.
    """

    def __init__(
        self,
        trt: Any,
        network: Network,
        device: str | torch.device = "cpu",
        wide: torch.dtype | None = None,
        all_reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._network, self._device, self._wide, self._all_reduce = network, device, wide, all_reduce
        self._steps: list[tuple[Any, Callable[..., Tensor], list[str | None]]] = []
        definition = network.definition
        for index in range(definition.num_layers):
            layer = definition.get_layer(index)
            kind = layer.type.name
            layer.__class__ = getattr(trt, _CLASSES[kind])  # the base class that is returned hides what makes it itself
            compute: Callable[..., Tensor] = getattr(self, "_" + kind.lower())
            inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
            self._steps.append((layer, compute, [None if item is None else item.name for item in inputs]))

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name. Every input must be given, in its declared type and shape."""
        known: dict[str, Tensor] = dict(inputs)
        for spec in self._network.inputs:
            given = known[spec.name]
            assert given.dtype == TORCH_TYPES[spec.dtype], (spec, given.dtype)
            _check_shape(spec.name, given, tuple(-1 if isinstance(n, str) else n for n in spec.shape))
            known[spec.name] = given.to(self._held(given.dtype))
        for layer, compute, names in self._steps:
            result = compute(layer, *(None if name is None else known[name] for name in names))
            declared = layer.get_output(0)
            wanted = self._type(declared.dtype)
            assert result.dtype == wanted, (layer.name, layer.type, result.dtype, wanted)
            _check_shape(layer.name, result, tuple(declared.shape))
            known[declared.name] = result
        return {spec.name: known[spec.name] for spec in self._network.outputs}

    def _held(self, dtype: torch.dtype) -> torch.dtype:
        return self._wide if self._wide is not None and dtype in _FLOATS else dtype

    def _type(self, dtype: Any) -> torch.dtype:
        return self._held(TORCH_TYPES[_BY_NAME[dtype.name]])

    def _constant(self, layer: Any) -> Tensor:
        output = layer.get_output(0)
        made = tensor_of(self._network.arrays[output.name], _BY_NAME[output.dtype.name], tuple(layer.shape))
        return made.to(self._device, self._held(made.dtype))

    def _gather(self, layer: Any, table: Tensor, rows: Tensor) -> Tensor:
        assert layer.axis == 0 and layer.num_elementwise_dims == 0
        return table[rows.long()]

    def _cast(self, layer: Any, x: Tensor) -> Tensor:
        return x.to(self._type(layer.to_type))

    def _unary(self, layer: Any, x: Tensor) -> Tensor:
        return _UNARY[layer.op.name](x)

    def _elementwise(self, layer: Any, a: Tensor, b: Tensor) -> Tensor:
        assert a.dim() == b.dim(), "TensorRT broadcasts sizes, not ranks"
        return _ELEMENTWISE[layer.op.name](a, b)

    def _reduce(self, layer: Any, x: Tensor) -> Tensor:
        axes = [axis for axis in range(x.dim()) if layer.axes >> axis & 1]
        return _REDUCE[layer.op.name](x, axes, keepdim=layer.keep_dims)

    def _activation(self, layer: Any, x: Tensor) -> Tensor:
        return {"SIGMOID": torch.sigmoid}[layer.type.name](x)

    def _shuffle(self, layer: Any, x: Tensor) -> Tensor:
        return x.reshape(tuple(layer.reshape_dims))

    def _shape(self, layer: Any, x: Tensor) -> Tensor:
        return torch.tensor(x.shape, device=x.device)

    def _slice(self, layer: Any, x: Tensor, start: Tensor | None, size: Tensor) -> Tensor:
        assert start is None and all(step == 1 for step in layer.stride)
        for axis, (begin, count) in enumerate(zip(layer.start, size.tolist(), strict=True)):
            x = x.narrow(axis, begin, count)
        return x

    def _matrix_multiply(self, layer: Any, a: Tensor, b: Tensor) -> Tensor:
        assert (layer.op0.name, layer.op1.name) == ("NONE", "TRANSPOSE")
        return a @ b.T

    def _quantize(self, layer: Any, x: Tensor, scale: Tensor) -> Tensor:
        assert scale.numel() == 1
        scaled = x.to(self._held(torch.float32)) / scale
        if layer.to_type.name == "FP8":
            return scaled.clamp(-448, 448).to(torch.float8_e4m3fn)
        return torch.round(scaled).clamp(-128, 127).to(torch.int8)

    def _dequantize(self, layer: Any, x: Tensor, scale: Tensor) -> Tensor:
        if scale.dim() == 1 and len(scale) > 1:
            assert layer.axis == 0
            scale = scale[:, None]
        elif scale.dim() == 2:
            scale = scale.repeat_interleave(x.shape[1] // scale.shape[1], 1)
        wide = self._held(torch.float32)
        return (x.to(wide) * scale.to(wide)).to(self._type(layer.to_type))

    def _dist_collective(self, layer: Any, x: Tensor) -> Tensor:
        assert self._all_reduce is not None and layer.num_ranks > 1, "the sum of one is no sum"
        return self._all_reduce(x)

    def _rotary_embedding(self, layer: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """x [T, heads, 1, D], rows [T, 1, D / 2]: batch, heads, sequence, features."""
        assert not layer.interleaved and layer.rotary_embedding_dim == 0
        first, second = x.chunk(2, -1)
        cosines, sines = cosines[:, None], sines[:, None]
        return torch.cat([first * cosines - second * sines, second * cosines + first * sines], -1)


class WalkedSegments:
    """Carries out segments as a `SegmentModel` asks for it, from the tensors that engines would be given."""

    def __init__(self, walks: Mapping[str, Walk], segments: Mapping[str, Segment]) -> None:
        self._walks, self._segments = walks, segments

    def run(self, segment: str, profile: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        given = {}
        for spec in self._segments[segment].inputs:
            tensor = inputs[spec.name]
            if spec.dtype == "int4":
                tensor = torch.from_numpy(unpack_int4(tensor.numpy()))
            given[spec.name] = (
                tensor
                if any(isinstance(size, str) for size in spec.shape)
                else tensor.view([int(n) for n in spec.shape])
            )
        made = self._walks[segment](given)
        assert made.keys() == outputs.keys()
        for name, tensor in made.items():
            outputs[name].copy_(tensor)

    def can_capture(self, stream: int) -> bool:
        """There is no GPU, so no graph."""
        return False

    def save(self) -> None:
        """Nothing was compiled."""


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    fits = tensor.dim() == len(shape) and all(
        want in (-1, size) for want, size in zip(shape, tensor.shape, strict=True)
    )
    assert fits, (name, tuple(tensor.shape), shape)
