"""Matrix product of fp16 or bf16 activations with int8 or int4 weights, which are widened in registers.

T tokens, N outputs, K inputs, G groups of adjacent inputs per output. Weights are symmetric: number × scale, with
float32 scales [N, G] (`quant.weight`); one group is one scale per output channel. A tile's sum is multiplied by the
scale of its group in float32, so the weight itself is never rounded.

Packing of int4: two in a byte, as number + 8. In every run of 32 inputs byte j (0 to 15) holds input j in its low half
and input j + 16 in its high one. So both halves of 16 adjacent bytes belong to 16 adjacent inputs, and no lane has to
hand a value to another.

The product is computed as weight × x transposed: what comes from registers must be the left operand of Hopper's
tensor cores, and its 64 rows are then outputs, of which there are enough, and not tokens.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pageflight.core.errors import ConfigError
from pageflight.kernels.builds import KernelBuild
from pageflight.kernels.gemm_fp8 import add_parts_kernel, tile_of_program
from pageflight.kernels.tuning import Problem, Tiles, key_of, split_of, tiles_of

RUN = 32
"""Inputs that are packed together."""
_HALF = tl.constexpr(RUN // 2)


# the number of tokens changes every step: looked at, each kind of number would be compiled anew
@triton.jit(do_not_specialize=["num_tokens"])
def _gemm_int_kernel(
    x,
    weight,
    scales,
    bias,
    out,
    num_tokens,
    num_outputs,
    num_inputs,
    group_size,
    stride_x,
    stride_weight,
    stride_scales,
    stride_out,
    PACKED: tl.constexpr,
    GROUPED: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per (tile of outputs, part of the inputs). `PACKED`: int4. `GROUPED`: BLOCK_K divides a group.

    `SPLIT_K` above 1: `out` is the float32 workspace [SPLIT_K, T, N]; the second kernel adds parts and bias.
    """
    row, column = tile_of_program(tl.program_id(0), num_tokens, num_outputs, BLOCK_T, BLOCK_N)
    part = tl.program_id(1)
    rows, columns = row * BLOCK_T + tl.arange(0, BLOCK_T), column * BLOCK_N + tl.arange(0, BLOCK_N)
    # rows behind the last read it again instead of being masked: their sums are not stored
    x_rows = x + tl.minimum(rows, num_tokens - 1).to(tl.int64)[None, :] * stride_x
    safe_columns = tl.minimum(columns, num_outputs - 1).to(tl.int64)
    weight_rows = weight + safe_columns[:, None] * stride_weight
    scale_rows = scales + safe_columns * stride_scales
    per_part = tl.cdiv(tl.cdiv(num_inputs, BLOCK_K), SPLIT_K) * BLOCK_K
    sums = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for begin in range(part * per_part, tl.minimum((part + 1) * per_part, num_inputs), BLOCK_K):
        if PACKED:
            places = tl.arange(0, BLOCK_K // 2)
            inputs = begin + places // _HALF * (2 * _HALF) + places % _HALF
            if EVEN_K:
                x_low = tl.load(x_rows + inputs[:, None])
                x_high = tl.load(x_rows + inputs[:, None] + _HALF)
                pairs = tl.load(weight_rows + begin // 2 + places[None, :])
            else:
                x_low = tl.load(x_rows + inputs[:, None], mask=inputs[:, None] < num_inputs, other=0.0)
                x_high = tl.load(x_rows + inputs[:, None] + _HALF, mask=inputs[:, None] < num_inputs, other=0.0)
                pairs = tl.load(weight_rows + begin // 2 + places[None, :], mask=inputs[None, :] < num_inputs, other=0)
            low = ((pairs & 15).to(tl.int8) - 8).to(x.dtype.element_ty)
            high = ((pairs >> 4).to(tl.int8) - 8).to(x.dtype.element_ty)
            products = tl.dot(low, x_low, input_precision="ieee")
            products = tl.dot(high, x_high, products, input_precision="ieee")
        else:
            inputs = begin + tl.arange(0, BLOCK_K)
            if EVEN_K:
                x_tile = tl.load(x_rows + inputs[:, None])
                numbers = tl.load(weight_rows + inputs[None, :])
            else:
                x_tile = tl.load(x_rows + inputs[:, None], mask=inputs[:, None] < num_inputs, other=0.0)
                numbers = tl.load(weight_rows + inputs[None, :], mask=inputs[None, :] < num_inputs, other=0)
            products = tl.dot(numbers.to(x.dtype.element_ty), x_tile, input_precision="ieee")
        if GROUPED:
            products *= tl.load(scale_rows + begin // group_size)[:, None]
        sums += products
    if not GROUPED:
        sums *= tl.load(scale_rows)[:, None]
    inside = (columns < num_outputs)[:, None] & (rows < num_tokens)[None, :]
    if SPLIT_K == 1:
        if bias is not None:
            sums += tl.load(bias + columns, mask=columns < num_outputs, other=0.0).to(tl.float32)[:, None]
        places_out = out + rows.to(tl.int64)[None, :] * stride_out + columns[:, None]
        tl.store(places_out, sums.to(out.dtype.element_ty), mask=inside)
    else:
        first = part.to(tl.int64) * num_tokens
        tl.store(out + (first + rows)[None, :] * num_outputs + columns[:, None], sums, mask=inside)


def gemm_int8(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    tiles: Tiles | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """The product [T, N] of `x` [T, K] and int8 `weight` [N, K] × float32 `scales` [N, G], in the dtype of `x`.

    `bias` [N] of any float dtype. `tiles` None takes those measured on this GPU, else `default_tiles`; the rounding of
    sums depends on `block_k` and `split_k`. `workspace`: float32, `split_k` * T * N elements; only for `split_k`
    above 1. Raises ConfigError for groups whose size is no multiple of 16.
    """
    assert weight.dtype == torch.int8
    return _launch(x, weight, scales, bias, out, tiles, workspace, kernel="gemm_int8", smallest_block=16)


def gemm_int4(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    tiles: Tiles | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """As `gemm_int8` for `packed` uint8 [N, K / 2]. Raises ConfigError for groups whose size is no multiple of 32."""
    assert packed.dtype == torch.uint8 and 2 * packed.shape[1] % RUN == 0
    return _launch(x, packed, scales, bias, out, tiles, workspace, kernel="gemm_int4", smallest_block=RUN)


def pack_int4(numbers: Tensor) -> Tensor:
    """uint8 [N, K / 2] of int8 [N, K] in -8 to 7; K a multiple of 32."""
    assert numbers.dtype == torch.int8 and numbers.shape[1] % RUN == 0
    assert bool(((numbers >= -8) & (numbers <= 7)).all()), "numbers beyond four bits"
    halves = (numbers.to(torch.int16) + 8).to(torch.uint8).view(len(numbers), -1, 2, RUN // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(len(numbers), -1)


def unpack_int4(packed: Tensor) -> Tensor:
    """int8 [N, K] of what `pack_int4` made."""
    pairs = packed.view(len(packed), -1, RUN // 2)
    return (torch.stack([pairs & 15, pairs >> 4], 2).to(torch.int8) - 8).reshape(len(packed), -1)


def default_tiles(num_tokens: int, num_outputs: int, num_inputs: int) -> Tiles:
    """Unmeasured: 64 outputs and split inputs for few tokens, 128 outputs for many."""
    block_t = min(max(16, 1 << (num_tokens - 1).bit_length()), 128)
    if num_tokens > 128:
        return Tiles(block_t=block_t, block_n=128, block_k=64, num_warps=8, num_stages=3)
    split_k = split_of(triton.cdiv(num_outputs, 64), num_inputs, 128)
    return Tiles(block_t=block_t, block_n=64, block_k=128 if block_t < 64 else 64, split_k=split_k, num_stages=4)


def candidates(num_tokens: int) -> tuple[Tiles, ...]:
    """Tiles worth measuring for so many tokens."""
    block_t = min(max(16, 1 << (num_tokens - 1).bit_length()), 128)
    return tuple(
        Tiles(
            block_t=block_t,
            block_n=block_n,
            block_k=block_k,
            split_k=split_k,
            num_warps=8 if block_n * block_t >= 128 * 128 else 4,
            num_stages=num_stages,
        )
        for block_n in (64, 128)
        for block_k in (32, 64, 128)
        for split_k in ((1, 2, 4, 8) if num_tokens <= 128 else (1,))
        for num_stages in (3, 4)
    )


def problem(
    kernel: str, num_tokens: int, num_outputs: int, num_inputs: int, group_size: int, dtype: torch.dtype, device: str
) -> Problem:
    """What `tuning.tune` measures: `kernel` is gemm_int8 or gemm_int4; `group_size` 0 is per channel."""
    x = torch.randn(num_tokens, num_inputs, device=device, dtype=dtype)
    width = num_inputs if kernel == "gemm_int8" else num_inputs // 2
    weight = torch.randint(0, 127, (num_outputs, width), device=device, dtype=torch.int8)
    scales = torch.ones(num_outputs, num_inputs // group_size if group_size else 1, device=device)

    def launch(tiles: Tiles | None) -> Tensor:
        if kernel == "gemm_int8":
            return gemm_int8(x, weight, scales, tiles=tiles)
        return gemm_int4(x, weight.view(torch.uint8), scales, tiles=tiles)

    key = key_of(kernel, dtype, num_tokens, num_outputs, num_inputs, group_size or num_inputs)
    return Problem(key=key, candidates=candidates(num_tokens), launch=launch)


def _launch(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
    tiles: Tiles | None,
    workspace: Tensor | None,
    *,
    kernel: str,
    smallest_block: int,
) -> Tensor:
    (num_tokens, num_inputs), num_outputs = x.shape, len(weight)
    out = x.new_empty(num_tokens, num_outputs) if out is None else out
    is_packed = weight.dtype == torch.uint8
    assert num_inputs == weight.shape[1] * (2 if is_packed else 1) and out.shape == (num_tokens, num_outputs)
    assert scales.dtype == torch.float32 and len(scales) == num_outputs and num_inputs % scales.shape[1] == 0
    assert x.stride(1) == weight.stride(1) == scales.stride(1) == out.stride(1) == 1 and out.dtype == x.dtype
    assert bias is None or (bias.shape == (num_outputs,) and bias.is_contiguous())
    group_size = num_inputs // scales.shape[1]
    is_grouped = scales.shape[1] > 1
    if is_grouped and group_size % smallest_block:
        raise ConfigError(f"group_size={group_size}: {kernel} needs a multiple of {smallest_block}, or 0 (per channel)")
    if not num_tokens:
        return out
    if tiles is None:
        key = key_of(kernel, x.dtype, num_tokens, num_outputs, num_inputs, group_size)
        tiles = tiles_of(x.device, key) or default_tiles(num_tokens, num_outputs, num_inputs)
    block_k = max(tiles.block_k, smallest_block)
    if is_grouped:  # as much of it as divides a group
        block_k = min(block_k, group_size & -group_size)
    parts = out
    if tiles.split_k > 1:
        size = tiles.split_k * num_tokens * num_outputs
        parts = x.new_empty(size, dtype=torch.float32) if workspace is None else workspace
        assert parts.numel() >= size and parts.dtype == torch.float32
    num_tiles = triton.cdiv(num_tokens, tiles.block_t) * triton.cdiv(num_outputs, tiles.block_n)
    _gemm_int_kernel[(num_tiles, tiles.split_k)](
        x,
        weight,
        scales,
        bias,
        parts,
        num_tokens,
        num_outputs,
        num_inputs,
        group_size,
        x.stride(0),
        weight.stride(0),
        scales.stride(0),
        out.stride(0),
        PACKED=is_packed,
        GROUPED=is_grouped,
        EVEN_K=num_inputs % block_k == 0,
        SPLIT_K=tiles.split_k,
        BLOCK_T=tiles.block_t,
        BLOCK_N=tiles.block_n,
        BLOCK_K=block_k,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if tiles.split_k > 1:
        add_parts_kernel[(num_tokens, triton.cdiv(num_outputs, 512))](
            parts,
            out,
            None,
            None,
            bias,
            num_tokens,
            num_outputs,
            out.stride(0),
            PER_TOKEN=False,
            PER_CHANNEL=False,
            SPLIT_K=tiles.split_k,
            BLOCK_N=512,
        )
    return out


_SIZES = ("num_tokens", "num_outputs", "num_inputs", "group_size")
_STRIDES = ("stride_x", "stride_weight", "stride_scales", "stride_out")


def _build(
    name: str, num_tokens: int, num_outputs: int, num_inputs: int, *, packed: bool, grouped: bool
) -> KernelBuild:
    tiles = default_tiles(num_tokens, num_outputs, num_inputs)
    return KernelBuild(
        name=name,
        kernel=_gemm_int_kernel,
        signature={
            "x": "*bf16",
            "weight": "*u8" if packed else "*i8",
            "scales": "*fp32",
            "out": "*bf16" if tiles.split_k == 1 else "*fp32",
            **dict.fromkeys((*_SIZES, *_STRIDES), "i32"),
        },
        constants={
            "bias": None,
            "PACKED": packed,
            "GROUPED": grouped,
            "EVEN_K": True,
            "SPLIT_K": tiles.split_k,
            "BLOCK_T": tiles.block_t,
            "BLOCK_N": tiles.block_n,
            "BLOCK_K": min(tiles.block_k, 64) if grouped else tiles.block_k,
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


BUILDS = (
    _build("gemm_int8_t16_n4096_k4096", 16, 4096, 4096, packed=False, grouped=False),
    _build("gemm_int8_g64_t16_n28672_k4096", 16, 28672, 4096, packed=False, grouped=True),
    _build("gemm_int8_t2048_n28672_k4096", 2048, 28672, 4096, packed=False, grouped=False),
    _build("gemm_int4_g64_t16_n4096_k4096", 16, 4096, 4096, packed=True, grouped=True),
    _build("gemm_int4_g64_t64_n28672_k4096", 64, 28672, 4096, packed=True, grouped=True),
    _build("gemm_int4_g64_t2048_n28672_k4096", 2048, 28672, 4096, packed=True, grouped=True),
    KernelBuild(
        name="gemm_int_add",
        kernel=add_parts_kernel,
        signature={
            "parts": "*fp32",
            "out": "*bf16",
            **dict.fromkeys(("num_tokens", "num_outputs", "stride_out"), "i32"),
        },
        constants={
            **dict.fromkeys(("x_scales", "weight_scales", "bias"), None),
            "PER_TOKEN": False,
            "PER_CHANNEL": False,
            "SPLIT_K": default_tiles(16, 4096, 4096).split_k,
            "BLOCK_N": 512,
        },
    ),
)
