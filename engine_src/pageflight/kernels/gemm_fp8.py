"""Matrix product of FP8 activations with FP8 weights (W8A8), and the choice between our kernel and cuBLASLt.

T tokens, N outputs, K inputs. x [T, K] and weight [N, K] are e4m3 with float32 scales: the product is
sum over k of x[t, k] * weight[n, k], times the scale of x (one, or one per token) times the scale of the weight (one,
or one per output channel), plus a bias. Sums are float32 throughout: Hopper's tensor cores keep about 14 bits of an
FP8 product's sum (DeepSeek-V3 technical report, 2024, section 3.3.2), so every tile's sum is added up outside of them.

The product is computed as weight × x transposed: Hopper's tensor cores take 64 rows, and a decode step has outputs
enough for that, but not tokens. Its tiles are still too few for all of a large card, so its inputs are split, and the
parts added by a second kernel, always in the same order.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pageflight.kernels.activation import FP8
from pageflight.kernels.builds import KernelBuild
from pageflight.kernels.tuning import Problem, Tiles, key_of, split_of, stored, tiles_of

KERNEL = "gemm_fp8"


@triton.jit
def tile_of_program(program, num_tokens, num_outputs, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """(row, column) of a program's tile: eight rows of tiles at a time, so that neighbours read the same weights."""
    rows, columns = tl.cdiv(num_tokens, BLOCK_T), tl.cdiv(num_outputs, BLOCK_N)
    first = program // (8 * columns) * 8
    height = tl.minimum(rows - first, 8)
    within = program % (8 * columns)
    return first + within % height, within // height


@triton.jit
def _scaled(
    sums,
    x_scales,
    weight_scales,
    bias,
    rows,
    columns,
    num_tokens,
    num_outputs,
    PER_TOKEN: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
):
    """Sums of products times both scales, where there are any, plus the bias."""
    if x_scales is not None:
        if PER_TOKEN:
            sums *= tl.load(x_scales + rows, mask=rows < num_tokens, other=0.0)[:, None]
        else:
            sums *= tl.load(x_scales)
    if weight_scales is not None:
        if PER_CHANNEL:
            sums *= tl.load(weight_scales + columns, mask=columns < num_outputs, other=0.0)[None, :]
        else:
            sums *= tl.load(weight_scales)
    if bias is not None:
        sums += tl.load(bias + columns, mask=columns < num_outputs, other=0.0).to(tl.float32)[None, :]
    return sums


# the number of tokens changes every step: looked at, each kind of number would be compiled anew
@triton.jit(do_not_specialize=["num_tokens"])
def _gemm_fp8_kernel(
    x,
    weight,
    out,
    x_scales,
    weight_scales,
    bias,
    num_tokens,
    num_outputs,
    num_inputs,
    stride_x,
    stride_weight,
    stride_out,
    PER_TOKEN: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per (tile of outputs, part of the inputs).

    `SPLIT_K` above 1: `out` is the float32 workspace [SPLIT_K, T, N], scales and bias are the second kernel's.
    """
    row, column = tile_of_program(tl.program_id(0), num_tokens, num_outputs, BLOCK_T, BLOCK_N)
    part = tl.program_id(1)
    rows, columns = row * BLOCK_T + tl.arange(0, BLOCK_T), column * BLOCK_N + tl.arange(0, BLOCK_N)
    inputs = tl.arange(0, BLOCK_K)
    # rows behind the last read it again instead of being masked: their sums are not stored
    x_rows = x + tl.minimum(rows, num_tokens - 1).to(tl.int64)[None, :] * stride_x
    weight_rows = weight + tl.minimum(columns, num_outputs - 1).to(tl.int64)[:, None] * stride_weight
    per_part = tl.cdiv(tl.cdiv(num_inputs, BLOCK_K), SPLIT_K) * BLOCK_K
    sums = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for begin in range(part * per_part, tl.minimum((part + 1) * per_part, num_inputs), BLOCK_K):
        places = begin + inputs
        if EVEN_K:
            x_tile = tl.load(x_rows + places[:, None])
            weight_tile = tl.load(weight_rows + places[None, :])
        else:
            x_tile = tl.load(x_rows + places[:, None], mask=places[:, None] < num_inputs, other=0.0)
            weight_tile = tl.load(weight_rows + places[None, :], mask=places[None, :] < num_inputs, other=0.0)
        sums = tl.dot(weight_tile, x_tile, sums, max_num_imprecise_acc=BLOCK_K)
    sums = tl.trans(sums)
    inside = (rows < num_tokens)[:, None] & (columns < num_outputs)[None, :]
    if SPLIT_K == 1:
        sums = _scaled(
            sums, x_scales, weight_scales, bias, rows, columns, num_tokens, num_outputs, PER_TOKEN, PER_CHANNEL
        )
        places_out = out + rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
        tl.store(places_out, sums.to(out.dtype.element_ty), mask=inside)
    else:
        first = part.to(tl.int64) * num_tokens
        tl.store(out + (first + rows)[:, None] * num_outputs + columns[None, :], sums, mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def add_parts_kernel(
    parts,
    out,
    x_scales,
    weight_scales,
    bias,
    num_tokens,
    num_outputs,
    stride_out,
    PER_TOKEN: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (token, tile of outputs): the parts in order, then scales and bias."""
    rows = tl.program_id(0) + tl.arange(0, 1)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (columns < num_outputs)[None, :]
    sums = tl.zeros((1, BLOCK_N), tl.float32)
    for part in tl.static_range(SPLIT_K):
        first = rows.to(tl.int64) + part * num_tokens
        sums += tl.load(parts + first[:, None] * num_outputs + columns[None, :], mask=inside, other=0.0)
    sums = _scaled(sums, x_scales, weight_scales, bias, rows, columns, num_tokens, num_outputs, PER_TOKEN, PER_CHANNEL)
    places_out = out + rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
    tl.store(places_out, sums.to(out.dtype.element_ty), mask=inside)


def gemm_fp8(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    tiles: Tiles | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """The product [T, N] of FP8 `x` [T, K] and `weight` [N, K], by our kernel.

    `x_scale` float32 of 1 element or [T], `weight_scale` of 1 element or [N]; `bias` [N] of any float dtype. The result
    has `out`'s dtype where it is given, else `out_dtype`: bf16, fp16 or fp32. `tiles` None takes those measured on this
    GPU, else `default_tiles`; the rounding of sums depends on `block_k` and `split_k`, so fix them where results must
    not change with T. `workspace`: float32, `split_k` * T * N elements; only for `split_k` above 1.
    """
    num_tokens, num_inputs = x.shape
    num_outputs = len(weight)
    out = x.new_empty(num_tokens, num_outputs, dtype=out_dtype) if out is None else out
    _check(x, weight, x_scale, weight_scale, bias, out)
    if not num_tokens:
        return out
    if tiles is None:
        key = key_of(KERNEL, out.dtype, num_tokens, num_outputs, num_inputs)
        tiles = tiles_of(x.device, key) or default_tiles(num_tokens, num_outputs, num_inputs)
    per_token, per_channel = x_scale.numel() > 1, weight_scale.numel() > 1
    parts = out
    if tiles.split_k > 1:
        size = tiles.split_k * num_tokens * num_outputs
        parts = x.new_empty(size, dtype=torch.float32) if workspace is None else workspace
        assert parts.numel() >= size and parts.dtype == torch.float32
    num_tiles = triton.cdiv(num_tokens, tiles.block_t) * triton.cdiv(num_outputs, tiles.block_n)
    _gemm_fp8_kernel[(num_tiles, tiles.split_k)](
        x,
        weight,
        parts,
        x_scale,
        weight_scale,
        bias,
        num_tokens,
        num_outputs,
        num_inputs,
        x.stride(0),
        weight.stride(0),
        out.stride(0),
        PER_TOKEN=per_token,
        PER_CHANNEL=per_channel,
        EVEN_K=num_inputs % tiles.block_k == 0,
        SPLIT_K=tiles.split_k,
        BLOCK_T=tiles.block_t,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if tiles.split_k > 1:
        add_parts_kernel[(num_tokens, triton.cdiv(num_outputs, 512))](
            parts,
            out,
            x_scale,
            weight_scale,
            bias,
            num_tokens,
            num_outputs,
            out.stride(0),
            PER_TOKEN=per_token,
            PER_CHANNEL=per_channel,
            SPLIT_K=tiles.split_k,
            BLOCK_N=512,
        )
    return out


def scaled_mm(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """As `gemm_fp8`, by whatever was measured to be faster on this GPU for the shape.

    Not measured: by cuBLASLt where it can. On a CPU always by our kernel (interpreted).
    """
    num_tokens, num_inputs = x.shape
    out = x.new_empty(num_tokens, len(weight), dtype=out_dtype) if out is None else out
    choice = stored(x.device).get(key_of(KERNEL, out.dtype, num_tokens, len(weight), num_inputs))
    prefers_library = choice is None or choice.tiles is None
    if prefers_library and x.is_cuda and library_can(x, weight, x_scale, weight_scale, bias, out):
        return by_library(x, weight, x_scale, weight_scale, bias, out)
    return gemm_fp8(x, weight, x_scale, weight_scale, bias=bias, out=out, workspace=workspace)


def library_can(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor
) -> bool:
    """Whether `torch._scaled_mm` takes it: whole 16s, both scales of one kind, bf16 out if per token."""
    if not len(x) or x.shape[1] % 16 or len(weight) % 16:
        return False
    if not (x.is_contiguous() and weight.is_contiguous() and out.is_contiguous()):
        return False
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        return False
    if bias is not None and (bias.dtype != out.dtype or out.dtype == torch.float32):
        return False
    if x_scale.numel() == weight_scale.numel() == 1:
        return True
    return x_scale.numel() == len(x) and weight_scale.numel() == len(weight) and out.dtype == torch.bfloat16


def by_library(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor
) -> Tensor:
    """The product by `torch._scaled_mm`; its sums in full precision, as ours."""
    if x_scale.numel() == weight_scale.numel() == 1:
        x_scale, weight_scale = x_scale.reshape(()), weight_scale.reshape(())
    else:
        x_scale, weight_scale = x_scale.reshape(-1, 1), weight_scale.reshape(1, -1)
    torch._scaled_mm(
        x, weight.t(), x_scale, weight_scale, bias=bias, out_dtype=out.dtype, use_fast_accum=False, out=out
    )
    return out


def default_tiles(num_tokens: int, num_outputs: int, num_inputs: int) -> Tiles:
    """Unmeasured: small tiles and split inputs for the few tokens of a decode step, square ones for prefill."""
    if num_tokens > 128:
        return Tiles(block_t=128, block_n=128, block_k=128, num_warps=8, num_stages=3)
    block_t = max(16, 1 << (num_tokens - 1).bit_length())
    block_n, block_k = 64, 128
    split_k = split_of(triton.cdiv(num_outputs, block_n), num_inputs, block_k)
    return Tiles(block_t=block_t, block_n=block_n, block_k=block_k, split_k=split_k, num_warps=4, num_stages=4)


def candidates(num_tokens: int) -> tuple[Tiles, ...]:
    """Tiles worth measuring for so many tokens."""
    if num_tokens > 128:
        return tuple(
            Tiles(block_t=block_t, block_n=block_n, block_k=block_k, num_warps=num_warps, num_stages=num_stages)
            for block_t, block_n in ((64, 128), (128, 64), (128, 128), (128, 256))
            for block_k in (64, 128)
            for num_warps in (4, 8)
            for num_stages in (3, 4)
        )
    block_t = max(16, 1 << (num_tokens - 1).bit_length())
    return tuple(
        Tiles(block_t=block_t, block_n=block_n, block_k=block_k, split_k=split_k, num_warps=4, num_stages=num_stages)
        for block_n in (32, 64, 128)
        for block_k in (128, 256)
        for split_k in (1, 2, 4, 8)
        for num_stages in (3, 5)
    )


def problem(num_tokens: int, num_outputs: int, num_inputs: int, out_dtype: torch.dtype, device: str) -> Problem:
    """What `tuning.tune` measures for a shape: our kernel's candidates, and cuBLASLt where it can."""
    x = torch.randn(num_tokens, num_inputs, device=device).to(FP8)
    weight = torch.randn(num_outputs, num_inputs, device=device).to(FP8)
    x_scale, weight_scale = torch.ones(num_tokens, device=device), torch.ones(num_outputs, device=device)
    out = torch.empty(num_tokens, num_outputs, device=device, dtype=out_dtype)
    library = library_can(x, weight, x_scale, weight_scale, None, out)

    def launch(tiles: Tiles | None) -> Tensor:
        if tiles is None:
            return by_library(x, weight, x_scale, weight_scale, None, out)
        return gemm_fp8(x, weight, x_scale, weight_scale, out=out, tiles=tiles)

    return Problem(
        key=key_of(KERNEL, out_dtype, num_tokens, num_outputs, num_inputs),
        candidates=(*((None,) if library else ()), *candidates(num_tokens)),
        launch=launch,
    )


def _check(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    assert x.dtype == weight.dtype == FP8, f"e4m3 values, not {x.dtype} and {weight.dtype}"
    assert x.shape[1] == weight.shape[1] and out.shape == (len(x), len(weight))
    assert x.stride(1) == weight.stride(1) == out.stride(1) == 1, "inputs lie together"
    assert x_scale.dtype == weight_scale.dtype == torch.float32
    assert x_scale.numel() in (1, len(x)) and weight_scale.numel() in (1, len(weight))
    assert x_scale.is_contiguous() and weight_scale.is_contiguous()
    assert bias is None or (bias.shape == (len(weight),) and bias.is_contiguous())


_SIZES = dict.fromkeys(("num_tokens", "num_outputs", "num_inputs", "stride_x", "stride_weight"), "i32")


def _build(
    name: str, num_tokens: int, num_outputs: int, num_inputs: int, *, per_row: bool = True
) -> tuple[KernelBuild, ...]:
    """The product to bf16, its scales `per_row` or one each; and the second kernel where the first is split."""
    tiles = default_tiles(num_tokens, num_outputs, num_inputs)
    scales = {"x_scales": "*fp32", "weight_scales": "*fp32"}
    kinds = {"PER_TOKEN": per_row, "PER_CHANNEL": per_row, "SPLIT_K": tiles.split_k, "bias": None}
    blocks = {"BLOCK_T": tiles.block_t, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k}
    product = KernelBuild(
        name=name,
        kernel=_gemm_fp8_kernel,
        signature={
            "x": "*fp8e4nv",
            "weight": "*fp8e4nv",
            "out": "*bf16" if tiles.split_k == 1 else "*fp32",
            **scales,
            **_SIZES,
            "stride_out": "i32",
        },
        constants={**kinds, **blocks, "EVEN_K": True},
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        min_capability=89,
    )
    if tiles.split_k == 1:
        return (product,)
    sizes = dict.fromkeys(("num_tokens", "num_outputs", "stride_out"), "i32")
    add = KernelBuild(
        name=f"{name}_add",
        kernel=add_parts_kernel,
        signature={"parts": "*fp32", "out": "*bf16", **scales, **sizes},
        constants={**kinds, "BLOCK_N": 512},
    )
    return product, add


BUILDS = (
    *_build("gemm_fp8_t16_n4096_k4096", 16, 4096, 4096),
    *_build("gemm_fp8_tensor_t16_n4096_k4096", 16, 4096, 4096, per_row=False),
    *_build("gemm_fp8_t64_n28672_k4096", 64, 28672, 4096),
    *_build("gemm_fp8_t128_n4096_k14336", 128, 4096, 14336),
    *_build("gemm_fp8_t2048_n28672_k4096", 2048, 28672, 4096),
)
