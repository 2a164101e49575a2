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

from pageflight.kernels.activation import silu_mul, silu_mul_fp8
from pageflight.kernels.norm import add_rms_norm, add_rms_norm_fp8, rms_norm, rms_norm_fp8
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


@dataclass(slots=True, eq=False)
class _Normed:
    """A normalised sum, not computed yet: what multiplies it says whether it wants e4m3 codes. Computed once."""

    x: Tensor
    y: Tensor | None
    weight: Tensor
    eps: float
    done: Tensor | None = None

    def value(self) -> Tensor:
        if self.done is None:
            y, self.y = self.y, None
            summed = (self.x, self.weight, self.eps)
            self.done = rms_norm(*summed) if y is None else add_rms_norm(y, *summed)
        return self.done

    def codes(self, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        assert self.done is None, "one product asks for codes"
        y, self.y = self.y, None
        summed = (self.x, self.weight, self.eps)
        return rms_norm_fp8(*summed, scale=scale) if y is None else add_rms_norm_fp8(y, *summed, scale=scale)

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype


@dataclass(frozen=True, slots=True, eq=False)
class _Gated:
    """SwiGLU of a fused gate and up, not computed yet, for the same reason."""

    gate_up: Tensor

    def value(self) -> Tensor:
        return silu_mul(self.gate_up)

    def codes(self, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        return silu_mul_fp8(self.gate_up, scale=scale)

    @property
    def dtype(self) -> torch.dtype:
        return self.gate_up.dtype


@dataclass(frozen=True, slots=True, eq=False)
class _Heads:
    """A part of a fused qkv, which is turned and written as a whole."""

    qkv: Tensor


Value = Tensor | _Sum | _Normed | _Gated | _Heads


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

    def value(self, x: Value) -> Tensor:
        """What an operation has left for the next one to do is done: for values that leave the decoder."""
        return _tensor(x)

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

    def rms_norm(self, x: Value, weight: str, eps: float) -> _Normed:
        values = self._weights[weight].values
        if not isinstance(x, _Sum):
            return _Normed(_tensor(x), None, values, eps)
        y, x.y = x.y, None
        return _Normed(x.x, y, values, eps)

    def linear(self, x: Value, weight: str, bias: str | None = None) -> Tensor:
        factor, offset = self._weights[weight], None if bias is None else self._weights[bias].values
        if factor.takes_codes and isinstance(x, _Normed | _Gated):
            codes, scale = x.codes(factor.input_scale)
            return factor.product_of_codes(codes, scale, offset, x.dtype)
        return factor.product(_tensor(x), offset)

    def split(self, x: Tensor, sizes: Sequence[int]) -> tuple[_Heads, ...]:
        return tuple(_Heads(x) for _ in sizes)

    def rope(self, x: _Heads, rows: None, num_heads: int) -> _Heads:
        return x

    def paged_attention(self, layer: int, q: _Heads, k: _Heads, v: _Heads) -> Tensor:
        assert self._pass is not None and q.qkv is k.qkv is v.qkv, "q, k and v of one product"
        return self._blocks.attend(layer, q.qkv, self._cosines, self._sines, self._pass)

    def gated_linear(self, x: Value, weight: str, bias: str | None = None) -> _Gated:
        return _Gated(self.linear(x, weight, bias))

    def add(self, a: Value, b: Tensor) -> _Sum:
        return _Sum(_tensor(a), b)


def _tensor(x: Value) -> Tensor:
    assert not isinstance(x, _Heads), "heads only attend"
    return x if isinstance(x, Tensor) else x.value()
