"""RMSNorm, with the residual added before and the result rounded to FP8 after, in one pass over memory.

T tokens, H features. RMSNorm is Zhang and Sennrich's ("Root mean square layer normalization", 2019). Everything is
float32 from the load to the one rounding of the store. FP8 and its scales: see `activation`.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pageflight.kernels.activation import FP8, KEEP, PER_TOKEN, STATIC, magnitude_of, scale_of, to_e4m3
from pageflight.kernels.builds import KernelBuild

MAX_FEATURES = 32768
"""A program holds a whole row in registers."""


@triton.jit
def _rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    scales,
    num_features,
    epsilon,
    stride_x,
    stride_residual,
    stride_out,
    ADD: tl.constexpr,
    MODE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per token. `ADD`: x is added to `residual` first, which is where the sum is left.

    `scales`: the scale (STATIC), where to write each token's (PER_TOKEN), or None (KEEP).
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    inside = columns < num_features
    values = tl.load(x + row * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        places = residual + row * stride_residual + columns
        values += tl.load(places, mask=inside, other=0.0).to(tl.float32)
        kept = values.to(residual.dtype.element_ty)
        tl.store(places, kept, mask=inside)
        values = kept.to(tl.float32)  # what later layers will read: the fused form equals the two operations
    mean_square = tl.sum(values * values, 0) / num_features
    normed = values * tl.rsqrt(mean_square + epsilon)
    normed *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if MODE == STATIC:
        normed = to_e4m3(tl.div_rn(normed, tl.load(scales)))
    if MODE == PER_TOKEN:
        scale = scale_of(magnitude_of(normed))
        tl.store(scales + row, scale)
        normed = to_e4m3(tl.div_rn(normed, scale))
    tl.store(out + row * stride_out + columns, normed.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, out: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x²) + epsilon) * weight: [T, H] in the dtype of `x` [T, H]; `weight` [H] of any float dtype."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    _launch(x, None, weight, epsilon, out, None, KEEP)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, *, out: Tensor | None = None) -> Tensor:
    """`residual` [T, H] += x in place, rounded to its dtype; returns RMSNorm of that sum in the dtype of `x` [T, H]."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    _launch(x, residual, weight, epsilon, out, None, KEEP)
    return out


def rms_norm_fp8(
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    scale: Tensor | None = None,
    out: Tensor | None = None,
    scales_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of `x` [T, H] in FP8 and its scale: `scale` (float32, one element) if given, else one per token [T]."""
    return _launch_fp8(x, None, weight, epsilon, scale, out, scales_out)


def add_rms_norm_fp8(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    scale: Tensor | None = None,
    out: Tensor | None = None,
    scales_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `rms_norm_fp8`, of `residual` [T, H] += x, which is changed in place."""
    return _launch_fp8(x, residual, weight, epsilon, scale, out, scales_out)


def _launch_fp8(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    epsilon: float,
    scale: Tensor | None,
    out: Tensor | None,
    scales_out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x, dtype=FP8, memory_format=torch.contiguous_format) if out is None else out
    if scale is not None:
        assert scale.numel() == 1 and scale.dtype == torch.float32
        _launch(x, residual, weight, epsilon, out, scale, STATIC)
        return out, scale
    scales = x.new_empty(len(x), dtype=torch.float32) if scales_out is None else scales_out
    assert scales.shape == (len(x),) and scales.dtype == torch.float32
    _launch(x, residual, weight, epsilon, out, scales, PER_TOKEN)
    return out, scales


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    epsilon: float,
    out: Tensor,
    scales: Tensor | None,
    mode: tl.constexpr,
) -> None:
    num_rows, num_features = x.shape
    assert num_features <= MAX_FEATURES, f"{num_features} features, limit {MAX_FEATURES}"
    assert weight.shape == (num_features,) and weight.is_contiguous()
    assert out.shape == x.shape and (residual is None or residual.shape == x.shape)
    assert all(t is None or t.stride(1) == 1 for t in (x, residual, out)), "features of a token lie together"
    if num_rows:
        tile = triton.next_power_of_2(num_features)
        _rms_norm_kernel[(num_rows,)](
            x,
            residual,
            weight,
            out,
            scales,
            num_features,
            epsilon,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            out.stride(0),
            ADD=residual is not None,
            MODE=mode.value,
            TILE=tile,
            num_warps=_num_warps(tile),
        )


def _num_warps(tile: int) -> int:
    """About 16 values in each thread."""
    return max(1, min(16, tile // 512))


def _build(name: str, num_features: int, *, add: bool, mode: tl.constexpr) -> KernelBuild:
    out = "*bf16" if mode == KEEP else "*fp8e4nv"
    signature = {"x": "*bf16", "weight": "*bf16", "out": out, "num_features": "i32", "epsilon": "fp32"}
    signature |= {"stride_x": "i32", "stride_residual": "i32", "stride_out": "i32"}
    constants = {"ADD": add, "MODE": mode.value, "TILE": num_features}
    for argument, given, pointer in (("residual", add, "*bf16"), ("scales", mode != KEEP, "*fp32")):
        if given:
            signature[argument] = pointer
        else:
            constants[argument] = None
    return KernelBuild(
        name=name,
        kernel=_rms_norm_kernel,
        signature=signature,
        constants=constants,
        num_warps=_num_warps(num_features),
        min_capability=80 if mode == KEEP else 89,
    )


BUILDS = (
    _build("rms_norm_bf16_4096", 4096, add=False, mode=KEEP),
    _build("add_rms_norm_bf16_4096", 4096, add=True, mode=KEEP),
    _build("rms_norm_bf16_4096_fp8_static", 4096, add=False, mode=STATIC),
    _build("rms_norm_bf16_4096_fp8_per_token", 4096, add=False, mode=PER_TOKEN),
    _build("add_rms_norm_bf16_4096_fp8_static", 4096, add=True, mode=STATIC),
    _build("add_rms_norm_bf16_4096_fp8_per_token", 4096, add=True, mode=PER_TOKEN),
)
