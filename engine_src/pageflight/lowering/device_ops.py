"""The decoder's operations on an NVIDIA GPU: our kernels around torch's matrix products.

Shapes: T packed tokens, L rows of logits.

The definition names one operation at a time; what a kernel does together is held back until it is asked for: a sum
until it is normalised, heads until they attend. In Triton's interpreter the same code runs on tensors of the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pageflight.kernels.activation import silu_mul
from pageflight.kernels.norm import add_rms_norm, rms_norm
from pageflight.lowering.device_blocks import DeviceBlocks, DeviceInputs
from pageflight.lowering.device_weight import DeviceWeight
from pageflight.models.config import DecoderConfig
from pageflight.models.rope import rope_tables


@dataclass(slots=True, eq=False)
class _Sum:
    """x + y, not added yet: normalising does that on the way. `x` is the residual, which then holds the sum."""

    x: Tensor
    y: Tensor | None

    def value(self) -> Tensor:
        if self.y is not None:
            self.x, self.y = self.x + self.y, None
        return self.x


@dataclass(frozen=True, slots=True, eq=False)
class _Heads:
    """A part of a fused qkv, which is turned and written as a whole."""

    qkv: Tensor


Value = Tensor | _Sum | _Heads


class DeviceOps:
    """Computes one pass at a time: `prepare` it, then run the decoder.

    The residual stream is changed in place where a sum is normalised: a value is used by one operation after that.
    """

    def __init__(
        self, config: DecoderConfig, weights: Mapping[str, DeviceWeight], blocks: DeviceBlocks, *, num_positions: int
    ) -> None:
        self._weights, self._blocks = weights, blocks
        tables = rope_tables(config, num_positions)
        self._cosines, self._sines = (torch.from_numpy(table).to(blocks.device) for table in tables)
        self._pass: DeviceInputs | None = None

    def prepare(self, inputs: DeviceInputs) -> None:
        self._pass = inputs

    # --- operations of the decoder ---

    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        assert self._pass is not None, "prepare comes first"
        return self._pass.ids_T, self._pass.positions_T, self._pass.take_L

    def embed(self, ids: Tensor, weight: str) -> Tensor:
        return functional.embedding(ids, self._weights[weight].values)

    def take(self, x: Value, rows: Tensor | None) -> Tensor:
        value = _tensor(x)
        return value if rows is None else value[rows]

    def rope_rows(self, positions: Tensor) -> None:
        """Heads are turned when they attend."""

    def rms_norm(self, x: Value, weight: str, eps: float) -> Tensor:
        if isinstance(x, _Sum) and x.y is not None:
            y, x.y = x.y, None
            return add_rms_norm(y, x.x, self._weights[weight].values, eps)
        return rms_norm(_tensor(x), self._weights[weight].values, eps)

    def linear(self, x: Value, weight: str, bias: str | None = None) -> Tensor:
        return self._weights[weight].product(_tensor(x), None if bias is None else self._weights[bias].values)

    def split(self, x: Tensor, sizes: Sequence[int]) -> tuple[_Heads, ...]:
        return tuple(_Heads(x) for _ in sizes)

    def rope(self, x: _Heads, rows: None, num_heads: int) -> _Heads:
        return x

    def paged_attention(self, layer: int, q: _Heads, k: _Heads, v: _Heads) -> Tensor:
        assert self._pass is not None and q.qkv is k.qkv is v.qkv, "q, k and v of one product"
        return self._blocks.attend(layer, q.qkv, self._cosines, self._sines, self._pass)

    def gated_linear(self, x: Value, weight: str, bias: str | None = None) -> Tensor:
        return silu_mul(self.linear(x, weight, bias))

    def add(self, a: Value, b: Tensor) -> _Sum:
        return _Sum(_tensor(a), b)


def _tensor(x: Value) -> Tensor:
    assert not isinstance(x, _Heads), "heads only attend"
    return x.value() if isinstance(x, _Sum) else x
