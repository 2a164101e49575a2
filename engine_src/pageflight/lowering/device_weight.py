"""A stored weight on the device, and its product with activations by the kernel for its form.

Shapes: T packed tokens, N outputs, K inputs, G groups of inputs per output.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pageflight.kernels.activation import quantise_fp8, quantise_fp8_per_token
from pageflight.kernels.gemm_fp8 import scaled_mm
from pageflight.kernels.gemm_int import RUN, gemm_int4, gemm_int8, pack_int4
from pageflight.quant.store import Weights
from pageflight.quant.weight import Weight

_SMALLEST_GROUP = {"I8": 16, "I4": RUN}  # of inputs that the kernels take


@dataclass(frozen=True, slots=True, eq=False)
class DeviceWeight:
    """`values` [N, K] in the type of products, or codes with `scales`: of FP8 [1] or [N], of integers [N, G].

    `input_scale` [1]: of FP8 activations for all tokens; without it every token has its own.
    """

    form: str
    values: Tensor
    scales: Tensor | None = None
    input_scale: Tensor | None = None

    @classmethod
    def of(cls, weight: Weight, compute: torch.dtype, device: torch.device) -> DeviceWeight:
        """`compute`: the type of activations. Integers in groups that no kernel takes are widened to it."""
        form = weight.dtype if _has_kernel(weight) else "wide"
        if form == "wide":
            is_bf16 = weight.dtype == "BF16"
            values = _tensor(weight.values).view(torch.bfloat16) if is_bf16 else _tensor(weight.float32())
            return cls(form, values.to(device=device, dtype=compute))
        assert weight.scales is not None
        scales = _tensor(weight.scales).to(device)
        if form == "F8_E4M3":
            scale = None if weight.input_scale is None else torch.tensor([weight.input_scale], device=device)
            codes = _tensor(weight.values).view(torch.float8_e4m3fn).to(device)
            return cls(form, codes, scales.reshape(-1), scale)
        codes = _tensor(weight.codes())
        return cls(form, (pack_int4(codes) if form == "I4" else codes).to(device), scales)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, K] times the transposed weight, in the type of x, plus `bias` [N]."""
        if self.scales is None:
            return functional.linear(x, self.values, bias)
        if self.form == "I8":
            return gemm_int8(x, self.values, self.scales, bias=bias)
        if self.form == "I4":
            return gemm_int4(x, self.values, self.scales, bias=bias)
        if self.input_scale is not None:
            codes, scale = quantise_fp8(x, self.input_scale), self.input_scale
        else:
            codes, scale = quantise_fp8_per_token(x)
        return self.product_of_codes(codes, scale, bias, x.dtype)

    @property
    def takes_codes(self) -> bool:
        """Whether products round activations to e4m3: what makes them may do it on the way."""
        return self.form == "F8_E4M3"

    def product_of_codes(self, codes: Tensor, scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """The product of e4m3 `codes` [T, K], worth `scale` [1] or [T] each."""
        assert self.takes_codes and self.scales is not None
        return scaled_mm(codes, self.values, scale, self.scales, bias=bias, out_dtype=out_dtype)


def load_weights(
    weights: Weights, names: Iterable[str], compute: torch.dtype, device: torch.device
) -> dict[str, DeviceWeight]:
    """The weights of these names; a tied head that is not stored for itself is the embedding, if that is here."""
    loaded: dict[str, DeviceWeight] = {}
    for name in names:
        shared = loaded.get(weights.stored_name(name))
        loaded[name] = DeviceWeight.of(weights[name], compute, device) if shared is None else shared
    return loaded


def _has_kernel(weight: Weight) -> bool:
    if weight.dtype == "F8_E4M3":
        return True
    if weight.dtype not in _SMALLEST_GROUP or weight.scales is None or weight.input_scale is not None:
        return False
    num_inputs, num_groups = weight.shape[1], weight.scales.shape[1]
    smallest = _SMALLEST_GROUP[weight.dtype]
    fits_groups = num_groups == 1 or num_inputs // num_groups % smallest == 0
    return fits_groups and (weight.dtype != "I4" or num_inputs % RUN == 0)


def _tensor(array: NDArray[np.generic]) -> Tensor:
    """In memory of its own: files are mapped read-only."""
    return torch.from_numpy(array.copy())
