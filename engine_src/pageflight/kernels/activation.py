"""Gated activations, and values rounded to FP8 for the matrix product that follows.

T tokens, H features of one, I intermediate size. FP8 is e4m3 (Micikevicius et al., "FP8 formats for deep learning",
2022): its greatest number is 448, and a value x is stored as round(x / scale). A scale is a float32: one for the tensor
(measured beforehand) or one per token (measured here, its greatest magnitude / 448).
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pageflight.kernels.builds import KernelBuild

FP8 = torch.float8_e4m3fn
FP8_MAX = tl.constexpr(448.0)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
SMALLEST_SCALE = tl.constexpr(2.0**-126)  # the smallest normal float32: a GPU may flush what is below

KEEP, STATIC, PER_TOKEN = (tl.constexpr(mode) for mode in range(3))
"""What becomes of a result: stays in its dtype, is divided by a given scale, or by one of its token's own."""

_MAX_TILE = 4096


@triton.jit
def to_e4m3(x):
    """float32 to FP8, to nearest, even at ties; beyond ±448 the greatest number; NaN stays NaN."""
    x = tl.clamp(x, -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
    if INTERPRETED:  # its own conversion drops the carry of a rounded fraction, so round in float32 before it
        bits = x.to(tl.int32, bitcast=True)
        normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
        subnormal = (x + 24576.0) - 24576.0  # 1.5 * 2^14: its neighbours are 2^-9 apart, as those of subnormals are
        rounded = tl.where(tl.abs(x) < 2.0**-6, subnormal.to(tl.int32, bitcast=True), normal)
        x = tl.where(x == x, rounded, 0x7FF00000).to(tl.float32, bitcast=True)
    return x.to(tl.float8e4nv)


@triton.jit
def magnitude_of(x):
    """The bits of the greatest magnitude of a float32 tile: they order as the magnitudes do, and NaN comes last.

    A maximum of floats passes NaN by: a token that is none would look like one.
    """
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)


@triton.jit
def scale_of(magnitude):
    """The scale that maps a magnitude, given by its bits, to 448; 1 where that is zero or as good as zero."""
    scale = tl.div_rn(magnitude.to(tl.float32, bitcast=True), FP8_MAX)
    return tl.where(scale < SMALLEST_SCALE, 1.0, scale)


@triton.jit
def _magnitude_of_row(row, num_features, TILE: tl.constexpr):
    greatest = 0
    for begin in range(0, num_features, TILE):
        columns = begin + tl.arange(0, TILE)
        values = tl.load(row + columns, mask=columns < num_features, other=0.0).to(tl.float32)
        greatest = tl.maximum(greatest, magnitude_of(values))
    return greatest


@triton.jit
def _silu_mul_tile(gate_up_row, columns, num_features):
    gate = tl.load(gate_up_row + columns, mask=columns < num_features, other=0.0).to(tl.float32)
    up = tl.load(gate_up_row + num_features + columns, mask=columns < num_features, other=0.0).to(tl.float32)
    shrunk = tl.exp(-tl.abs(gate))  # never overflows
    return gate * (tl.where(gate < 0, shrunk, 1.0) / (1.0 + shrunk)) * up


@triton.jit
def _silu_mul_kernel(gate_up, out, scale, num_features, stride_in, stride_out, MODE: tl.constexpr, TILE: tl.constexpr):
    """One program per (token, tile) of the output [T, I]; `MODE` is KEEP or STATIC."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    result = _silu_mul_tile(gate_up + row * stride_in, columns, num_features)
    if MODE == STATIC:
        result = to_e4m3(tl.div_rn(result, tl.load(scale)))
    tl.store(out + row * stride_out + columns, result.to(out.dtype.element_ty), mask=columns < num_features)


@triton.jit
def _silu_mul_per_token_kernel(gate_up, out, scales, num_features, stride_in, stride_out, TILE: tl.constexpr):
    """One program per token: once over the row for its scale, once to divide by it."""
    row = tl.program_id(0).to(tl.int64)
    greatest = 0
    for begin in range(0, num_features, TILE):
        tile = _silu_mul_tile(gate_up + row * stride_in, begin + tl.arange(0, TILE), num_features)
        greatest = tl.maximum(greatest, magnitude_of(tile))
    scale = scale_of(greatest)
    tl.store(scales + row, scale)
    for begin in range(0, num_features, TILE):
        columns = begin + tl.arange(0, TILE)
        result = _silu_mul_tile(gate_up + row * stride_in, columns, num_features)
        tl.store(out + row * stride_out + columns, to_e4m3(tl.div_rn(result, scale)), mask=columns < num_features)


@triton.jit
def _quantise_kernel(x, out, scale, num_features, stride_in, stride_out, TILE: tl.constexpr):
    """One program per (token, tile), all by the one `scale`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    values = tl.load(x + row * stride_in + columns, mask=columns < num_features, other=0.0).to(tl.float32)
    divided = tl.div_rn(values, tl.load(scale))
    tl.store(out + row * stride_out + columns, to_e4m3(divided), mask=columns < num_features)


@triton.jit
def _quantise_per_token_kernel(x, out, scales, num_features, stride_in, stride_out, TILE: tl.constexpr):
    """One program per token: once over the row for its scale, once to divide by it."""
    row = tl.program_id(0).to(tl.int64)
    scale = scale_of(_magnitude_of_row(x + row * stride_in, num_features, TILE))
    tl.store(scales + row, scale)
    for begin in range(0, num_features, TILE):
        columns = begin + tl.arange(0, TILE)
        values = tl.load(x + row * stride_in + columns, mask=columns < num_features, other=0.0).to(tl.float32)
        tl.store(out + row * stride_out + columns, to_e4m3(tl.div_rn(values, scale)), mask=columns < num_features)


@triton.jit
def _token_magnitudes_kernel(x, magnitudes, num_features, stride_in, TILE: tl.constexpr):
    """One program per token: the greatest magnitude of its row, as a float32."""
    row = tl.program_id(0).to(tl.int64)
    tl.store(magnitudes + row, _magnitude_of_row(x + row * stride_in, num_features, TILE).to(tl.float32, bitcast=True))


# the number of tokens changes every step: looked at, each kind of number would be compiled anew
@triton.jit(do_not_specialize=["num_rows"])
def _tensor_scale_kernel(magnitudes, scale, num_rows, TILE: tl.constexpr):
    """One program: the scale of the tensor from the greatest magnitudes of its rows."""
    tl.store(scale, scale_of(_magnitude_of_row(magnitudes, num_rows, TILE)))


def silu_mul(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up, [T, I] in the dtype of `gate_up` [T, 2I], whose rows are gate then up.

    SwiGLU (Shazeer, "GLU variants improve transformer", 2020). Computed in float32 and rounded once.
    """
    num_rows, num_features = _halves(gate_up)
    out = gate_up.new_empty(num_rows, num_features) if out is None else out
    _launch_silu_mul(gate_up, out, None, KEEP)
    return out


def silu_mul_fp8(
    gate_up: Tensor, *, scale: Tensor | None = None, out: Tensor | None = None, scales_out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """silu(gate) * up in FP8 [T, I] and its scale: `scale` (float32, one element) if given, else one per token [T]."""
    num_rows, num_features = _halves(gate_up)
    out = gate_up.new_empty(num_rows, num_features, dtype=FP8) if out is None else out
    if scale is not None:
        _launch_silu_mul(gate_up, out, scale, STATIC)
        return out, scale
    scales = gate_up.new_empty(num_rows, dtype=torch.float32) if scales_out is None else scales_out
    assert out.shape == (num_rows, num_features) and out.stride(1) == 1 and scales.shape == (num_rows,)
    if num_rows:
        _silu_mul_per_token_kernel[(num_rows,)](
            gate_up,
            out,
            scales,
            num_features,
            gate_up.stride(0),
            out.stride(0),
            TILE=tile_of(num_features),
            num_warps=8,
        )
    return out, scales


def quantise_fp8(x: Tensor, scale: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`x` [T, H] / `scale` (float32, one element) in FP8."""
    num_rows, num_features = _rows(x)
    out = torch.empty_like(x, dtype=FP8, memory_format=torch.contiguous_format) if out is None else out
    assert scale.numel() == 1 and scale.dtype == torch.float32 and out.shape == x.shape and out.stride(1) == 1
    if num_rows:
        tile = tile_of(num_features)
        _quantise_kernel[(num_rows, triton.cdiv(num_features, tile))](
            x, out, scale, num_features, x.stride(0), out.stride(0), TILE=tile
        )
    return out


def quantise_fp8_per_token(
    x: Tensor, *, out: Tensor | None = None, scales_out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`x` [T, H] in FP8, and the float32 scale [T] of each of its rows."""
    num_rows, num_features = _rows(x)
    out = torch.empty_like(x, dtype=FP8, memory_format=torch.contiguous_format) if out is None else out
    scales = x.new_empty(num_rows, dtype=torch.float32) if scales_out is None else scales_out
    assert out.shape == x.shape and out.stride(1) == 1 and scales.shape == (num_rows,)
    if num_rows:
        _quantise_per_token_kernel[(num_rows,)](
            x, out, scales, num_features, x.stride(0), out.stride(0), TILE=tile_of(num_features), num_warps=8
        )
    return out, scales


def quantise_fp8_per_tensor(
    x: Tensor, *, out: Tensor | None = None, scale_out: Tensor | None = None, workspace: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`x` [T, H] in FP8, and the one float32 scale [1] that its greatest magnitude gives.

    `workspace`: float32, at least T elements. A token's values then depend on the other tokens of its step.
    """
    num_rows, num_features = _rows(x)
    scale = x.new_ones(1, dtype=torch.float32) if scale_out is None else scale_out
    workspace = x.new_empty(num_rows, dtype=torch.float32) if workspace is None else workspace
    assert workspace.numel() >= num_rows and scale.numel() == 1
    if num_rows:
        _token_magnitudes_kernel[(num_rows,)](x, workspace, num_features, x.stride(0), TILE=tile_of(num_features))
        _tensor_scale_kernel[(1,)](workspace, scale, num_rows, TILE=1024)
    return quantise_fp8(x, scale, out=out), scale


def tile_of(num_features: int) -> int:
    """How much of a row a program holds at a time: all of it, up to a bound."""
    return min(_MAX_TILE, 1 << (num_features - 1).bit_length())


def _launch_silu_mul(gate_up: Tensor, out: Tensor, scale: Tensor | None, mode: tl.constexpr) -> None:
    num_rows, num_features = _halves(gate_up)
    assert out.shape == (num_rows, num_features) and out.stride(1) == 1
    assert scale is None or (scale.numel() == 1 and scale.dtype == torch.float32)
    if num_rows:
        tile = min(1024, tile_of(num_features))
        _silu_mul_kernel[(num_rows, triton.cdiv(num_features, tile))](
            gate_up, out, scale, num_features, gate_up.stride(0), out.stride(0), MODE=mode.value, TILE=tile
        )


def _rows(x: Tensor) -> tuple[int, int]:
    assert x.dim() == 2 and x.stride(1) == 1, f"rows of adjacent features, not shape {list(x.shape)}"
    return x.shape[0], x.shape[1]


def _halves(gate_up: Tensor) -> tuple[int, int]:
    num_rows, both = _rows(gate_up)
    assert both % 2 == 0, f"gate and up of one size, not {both} features together"
    return num_rows, both // 2


_STRIDES = {"num_features": "i32", "stride_in": "i32", "stride_out": "i32"}

BUILDS = (
    KernelBuild(
        name="silu_mul_bf16",
        kernel=_silu_mul_kernel,
        signature={"gate_up": "*bf16", "out": "*bf16", **_STRIDES},
        constants={"scale": None, "MODE": 0, "TILE": 1024},
    ),
    KernelBuild(
        name="silu_mul_bf16_fp8_static",
        kernel=_silu_mul_kernel,
        signature={"gate_up": "*bf16", "out": "*fp8e4nv", "scale": "*fp32", **_STRIDES},
        constants={"MODE": 1, "TILE": 1024},
        min_capability=89,
    ),
    KernelBuild(
        name="silu_mul_bf16_fp8_per_token",
        kernel=_silu_mul_per_token_kernel,
        signature={"gate_up": "*bf16", "out": "*fp8e4nv", "scales": "*fp32", **_STRIDES},
        constants={"TILE": 4096},
        num_warps=8,
        min_capability=89,
    ),
    KernelBuild(
        name="quantise_bf16_fp8_static",
        kernel=_quantise_kernel,
        signature={"x": "*bf16", "out": "*fp8e4nv", "scale": "*fp32", **_STRIDES},
        constants={"TILE": 4096},
        min_capability=89,
    ),
    KernelBuild(
        name="quantise_bf16_fp8_per_token",
        kernel=_quantise_per_token_kernel,
        signature={"x": "*bf16", "out": "*fp8e4nv", "scales": "*fp32", **_STRIDES},
        constants={"TILE": 4096},
        num_warps=8,
        min_capability=89,
    ),
    KernelBuild(
        name="token_magnitudes_bf16",
        kernel=_token_magnitudes_kernel,
        signature={"x": "*bf16", "magnitudes": "*fp32", "num_features": "i32", "stride_in": "i32"},
        constants={"TILE": 4096},
    ),
    KernelBuild(
        name="tensor_scale",
        kernel=_tensor_scale_kernel,
        signature={"magnitudes": "*fp32", "scale": "*fp32", "num_rows": "i32"},
        constants={"TILE": 1024},
    ),
)
