"""A stored weight as torch tensors, and its product with activations: the arithmetic that engines are compared with.

Shapes: T packed tokens, N outputs, K inputs, G groups of inputs per output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pageflight.quant.float8 import E4M3_LIMIT, SMALLEST_PEAK
from pageflight.quant.weight import INT8_LIMIT, Weight


@dataclass(frozen=True, slots=True, eq=False)
class TorchWeight:
    """`values` are [N, K] codes where there are `scales` [N, G] or [1, 1], else the numbers themselves."""

    form: str
    values: Tensor
    scales: Tensor | None
    input_scale: float | None

    @classmethod
    def of(cls, weight: Weight) -> TorchWeight:
        """A weight in memory of its own (the file is mapped read-only). int4 is unpacked, for clarity."""
        values = torch.from_numpy((weight.codes() if weight.dtype == "I4" else weight.values).copy())
        if weight.dtype in ("BF16", "F8_E4M3"):
            values = values.view(torch.bfloat16 if weight.dtype == "BF16" else torch.float8_e4m3fn)
        scales = None if weight.scales is None else torch.from_numpy(weight.scales.copy())
        return cls(weight.dtype, values, scales, weight.input_scale)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, K] times the transposed weight, in the precision of x, plus `bias` [N]."""
        matrix = self._wide().to(x.dtype)
        if self.form == "F8_E4M3" or self.input_scale is not None:
            codes, scale = self._rounded(x.float())
            y = (functional.linear(codes, matrix.float()) * scale).to(x.dtype)
            return y if bias is None else y + bias
        return functional.linear(x, matrix, bias)

    def _wide(self) -> Tensor:
        """Widened at every use: quantised weights stay so in memory."""
        if self.scales is None:
            return self.values
        rows, groups = len(self.values), self.scales.shape[1]
        return (self.values.float().view(rows, groups, -1) * self.scales[:, :, None]).view(rows, -1)

    def _rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations as codes, float32 [T, K], and what one is worth: for all tokens [1, 1], or each its own [T, 1].

        Scales per token: Yao et al., ZeroQuant, 2022.
        """
        if self.input_scale is not None:
            scale = torch.full((1, 1), self.input_scale)
        else:
            scale = x.abs().amax(1, keepdim=True).clamp_min(SMALLEST_PEAK) / E4M3_LIMIT
        if self.form == "F8_E4M3":
            codes = (x / scale).clamp(-E4M3_LIMIT, E4M3_LIMIT).to(torch.float8_e4m3fn)
        else:
            codes = torch.round(x / scale).clamp(-INT8_LIMIT - 1, INT8_LIMIT)
        return codes.float(), scale
