"""A mixture of experts: the gated MLP of K of E experts for each token, weighted and added, without the host waiting.

T tokens, H features, I intermediate size, E experts, K of them for each token, S = T × K slots (`moe_order`). Weights
of all experts lie in one tensor, gate and up in one matrix: [E, 2I, H] and [E, H, I], in the dtype of x, or FP8 with
float32 scales per expert and output channel; then activations are quantised per token.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pageflight.kernels.activation import FP8, quantise_fp8_per_token, silu_mul, silu_mul_fp8
from pageflight.kernels.builds import KernelBuild
from pageflight.kernels.moe_order import Order, max_tiles, order_by_expert, route
from pageflight.kernels.tuning import Problem, Tiles, key_of, tiles_of

LAYER = "moe"


# the number of tokens changes every step: looked at, each kind of number would be compiled anew
@triton.jit(do_not_specialize=["num_slots", "num_tiles"])
def _grouped_gemm_kernel(
    x,
    weight,
    out,
    x_scales,
    weight_scales,
    slots,
    tile_experts,
    num_slots,
    num_tiles,
    num_outputs,
    num_inputs,
    stride_x,
    stride_expert,
    stride_weight,
    stride_out,
    SLOTS_PER_ROW: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per (tile of outputs, tile of slots); neighbours share an expert's weights.

    Slot s reads row s // `SLOTS_PER_ROW` of x and writes row s of `out`. As weight × x transposed: an expert of a
    decode step has a handful of tokens, but Hopper's tensor cores want 64 rows.
    """
    tile, column = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    expert = tl.load(tile_experts + tile).to(tl.int64)
    if expert < 0:
        return
    slots_T = tl.load(slots + tile * BLOCK_T + tl.arange(0, BLOCK_T))
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(slots_T, num_slots - 1) // SLOTS_PER_ROW  # a place without a slot reads what is not stored
    x_rows = x + rows.to(tl.int64)[None, :] * stride_x
    safe_columns = tl.minimum(columns, num_outputs - 1).to(tl.int64)
    weight_rows = weight + expert * stride_expert + safe_columns[:, None] * stride_weight
    sums = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for begin in range(0, num_inputs, BLOCK_K):
        places = begin + tl.arange(0, BLOCK_K)
        if EVEN_K:
            x_tile = tl.load(x_rows + places[:, None])
            weight_tile = tl.load(weight_rows + places[None, :])
        else:
            x_tile = tl.load(x_rows + places[:, None], mask=places[:, None] < num_inputs, other=0.0)
            weight_tile = tl.load(weight_rows + places[None, :], mask=places[None, :] < num_inputs, other=0.0)
        sums = tl.dot(weight_tile, x_tile, sums, input_precision="ieee", max_num_imprecise_acc=BLOCK_K)
    if x_scales is not None:
        sums *= tl.load(x_scales + rows)[None, :]
        sums *= tl.load(weight_scales + expert * num_outputs + safe_columns)[:, None]
    inside = (columns < num_outputs)[:, None] & (slots_T < num_slots)[None, :]
    places_out = out + slots_T.to(tl.int64)[None, :] * stride_out + columns[:, None]
    tl.store(places_out, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _combine_kernel(y, weights, out, num_features, stride_out, TOP_K: tl.constexpr, TILE: tl.constexpr):
    """One program per (token, tile of features): its K results, weighted, in the order of its choices."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    for choice in tl.static_range(TOP_K):
        slot = row * TOP_K + choice
        result = tl.load(y + slot * num_features + columns, mask=columns < num_features, other=0.0).to(tl.float32)
        total += result * tl.load(weights + slot)
    tl.store(out + row * stride_out + columns, total.to(out.dtype.element_ty), mask=columns < num_features)


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    order: Order,
    num_slots: int,
    *,
    slots_per_row: int,
    out_dtype: torch.dtype,
    x_scales: Tensor | None = None,
    weight_scales: Tensor | None = None,
    out: Tensor | None = None,
    tiles: Tiles,
) -> Tensor:
    """[S, N]: row s is `x`[s // slots_per_row] times the matrix of its expert, `weight` [E, N, K inputs].

    `order` has tiles of `tiles.block_t`. FP8 with `x_scales` float32 [rows of x] and `weight_scales` float32 [E, N].
    """
    num_experts, num_outputs, num_inputs = weight.shape
    out = x.new_empty(num_slots, num_outputs, dtype=out_dtype) if out is None else out
    assert order.block == tiles.block_t and x.shape == (num_slots // slots_per_row, num_inputs)
    assert x.dtype == weight.dtype and (x.dtype == FP8) == (x_scales is not None) == (weight_scales is not None)
    assert x.stride(1) == weight.stride(2) == out.stride(1) == 1 and out.shape == (num_slots, num_outputs)
    assert weight_scales is None or (
        weight_scales.shape == (num_experts, num_outputs) and weight_scales.is_contiguous()
    )
    if num_slots:
        num_tiles = max_tiles(num_slots, num_experts, order.block)
        _grouped_gemm_kernel[(num_tiles * triton.cdiv(num_outputs, tiles.block_n),)](
            x,
            weight,
            out,
            x_scales,
            weight_scales,
            order.slots,
            order.tile_experts,
            num_slots,
            num_tiles,
            num_outputs,
            num_inputs,
            x.stride(0),
            weight.stride(0),
            weight.stride(1),
            out.stride(0),
            SLOTS_PER_ROW=slots_per_row,
            EVEN_K=num_inputs % tiles.block_k == 0,
            BLOCK_T=tiles.block_t,
            BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return out


def combine(y: Tensor, weights: Tensor, *, out: Tensor | None = None) -> Tensor:
    """[T, H] in the dtype of `y` [S, H]: each token's rows times its `weights` float32 [T, K], added in float32."""
    (num_tokens, top_k), num_features = weights.shape, y.shape[1]
    out = y.new_empty(num_tokens, num_features) if out is None else out
    assert y.is_contiguous() and weights.is_contiguous() and len(y) == num_tokens * top_k
    assert out.shape == (num_tokens, num_features) and out.stride(1) == 1
    if num_tokens:
        tile = min(1024, triton.next_power_of_2(num_features))
        _combine_kernel[(num_tokens, triton.cdiv(num_features, tile))](
            y, weights, out, num_features, out.stride(0), TOP_K=top_k, TILE=tile
        )
    return out


def mixture(
    x: Tensor,
    router_logits: Tensor,
    gate_up: Tensor,
    down: Tensor,
    top_k: int,
    *,
    renormalise: bool = True,
    gate_up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
    out: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """The whole layer: [T, H] of `x` [T, H] and `router_logits` [T, E], by weights [E, 2I, H] and [E, H, I].

    FP8 weights come with scales [E, 2I] and [E, H]. `tiles` None takes those measured on this GPU, else
    `default_tiles`.
    """
    num_tokens, num_experts = router_logits.shape
    num_slots = num_tokens * top_k
    if tiles is None:
        key = key_of(LAYER, gate_up.dtype, num_tokens, top_k, *gate_up.shape)
        tiles = tiles_of(x.device, key) or default_tiles(num_slots, num_experts, gate_up.dtype)
    weights, experts = route(router_logits, top_k, renormalise=renormalise)
    order = order_by_expert(experts, num_experts, tiles.block_t)
    rows, row_scales = quantise_fp8_per_token(x) if gate_up.dtype == FP8 else (x, None)
    both = grouped_gemm(
        rows,
        gate_up,
        order,
        num_slots,
        slots_per_row=top_k,
        out_dtype=x.dtype,
        x_scales=row_scales,
        weight_scales=gate_up_scales,
        tiles=tiles,
    )
    hidden, hidden_scales = silu_mul_fp8(both) if down.dtype == FP8 else (silu_mul(both), None)
    y = grouped_gemm(
        hidden,
        down,
        order,
        num_slots,
        slots_per_row=1,
        out_dtype=x.dtype,
        x_scales=hidden_scales,
        weight_scales=down_scales,
        tiles=tiles,
    )
    return combine(y, weights, out=out)


def default_tiles(num_slots: int, num_experts: int, dtype: torch.dtype) -> Tiles:
    """Unmeasured: as many slots as an expert has on average, 16 to 128; 64 bytes of inputs or more."""
    average = max(1, num_slots // num_experts)
    block_t = min(max(16, 1 << (average - 1).bit_length()), 128)
    block_k = 128 if dtype == FP8 else 64
    block_n, num_warps = (128, 8) if block_t == 128 else (64, 4)
    return Tiles(block_t=block_t, block_n=block_n, block_k=block_k, num_warps=num_warps, num_stages=3)


def candidates(num_slots: int, num_experts: int, dtype: torch.dtype) -> tuple[Tiles, ...]:
    """Tiles worth measuring: half and twice the default's slots, and inputs of 64 to 256 bytes."""
    block_t, widest = default_tiles(num_slots, num_experts, dtype).block_t, 256 // dtype.itemsize
    return tuple(
        Tiles(block_t=t, block_n=block_n, block_k=block_k, num_warps=num_warps, num_stages=num_stages)
        for t in sorted({max(16, block_t // 2), block_t, min(128, block_t * 2)})
        for block_n in (64, 128)
        for block_k in (widest // 4, widest // 2, widest)
        for num_warps in (4, 8)
        for num_stages in (3, 4)
    )


def problem(
    num_tokens: int, num_experts: int, top_k: int, hidden: int, intermediate: int, dtype: torch.dtype, device: str
) -> Problem:
    """What `tuning.tune` measures: the whole layer with unquantised weights of `dtype`, tokens spread at random."""
    x = torch.randn(num_tokens, hidden, device=device).to(dtype)
    logits = torch.randn(num_tokens, num_experts, device=device)
    gate_up = torch.randn(num_experts, 2 * intermediate, hidden, device=device).to(dtype)
    down = torch.randn(num_experts, hidden, intermediate, device=device).to(dtype)

    def launch(tiles: Tiles | None) -> Tensor:
        return mixture(x, logits, gate_up, down, top_k, tiles=tiles)

    key = key_of(LAYER, dtype, num_tokens, top_k, *gate_up.shape)
    return Problem(key=key, candidates=candidates(num_tokens * top_k, num_experts, dtype), launch=launch)


_SIZES = ("num_slots", "num_tiles", "num_outputs", "num_inputs", "stride_x", "stride_weight", "stride_out")


def _build(name: str, num_slots: int, *, slots_per_row: int, is_fp8: bool) -> KernelBuild:
    tiles = default_tiles(num_slots, 8, FP8 if is_fp8 else torch.bfloat16)
    values = "*fp8e4nv" if is_fp8 else "*bf16"
    scales = ("x_scales", "weight_scales")
    return KernelBuild(
        name=name,
        kernel=_grouped_gemm_kernel,
        signature={
            "x": values,
            "weight": values,
            "out": "*bf16",
            **(dict.fromkeys(scales, "*fp32") if is_fp8 else {}),
            **dict.fromkeys(("slots", "tile_experts"), "*i32"),
            **dict.fromkeys(_SIZES, "i32"),
            "stride_expert": "i32",
        },
        constants={
            **({} if is_fp8 else dict.fromkeys(scales, None)),
            "SLOTS_PER_ROW": slots_per_row,
            "EVEN_K": True,
            "BLOCK_T": tiles.block_t,
            "BLOCK_N": tiles.block_n,
            "BLOCK_K": tiles.block_k,
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        min_capability=89 if is_fp8 else 80,
    )


BUILDS = (
    _build("moe_gemm_first_bf16_s64", 64, slots_per_row=2, is_fp8=False),
    _build("moe_gemm_second_bf16_s64", 64, slots_per_row=1, is_fp8=False),
    _build("moe_gemm_first_bf16_s4096", 4096, slots_per_row=2, is_fp8=False),
    _build("moe_gemm_first_fp8_s64", 64, slots_per_row=2, is_fp8=True),
    _build("moe_gemm_first_fp8_s4096", 4096, slots_per_row=2, is_fp8=True),
    KernelBuild(
        name="moe_combine_bf16_k2",
        kernel=_combine_kernel,
        signature={"y": "*bf16", "weights": "*fp32", "out": "*bf16", "num_features": "i32", "stride_out": "i32"},
        constants={"TOP_K": 2, "TILE": 1024},
    ),
)
