"""Which experts a token goes to, and all (token, expert) pairs in the order of experts, found on the device.

T tokens, E experts, K of them for each token. A slot is a pair: slot s is token s // K. Slots are put into tiles of
`block` that belong to one expert each; what is left over of an expert's last tile holds no slot. How many tiles there
are is known on the device alone, so there is room for as many as there can be, and those behind the last have no
expert: grids depend on shapes only. No atomics: the order is the same every time.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pageflight.kernels.builds import KernelBuild

_TILE = 1024


@triton.jit
def _route_kernel(
    logits,
    weights,
    experts,
    num_experts,
    stride_logits,
    TOP_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """One program per token: the greatest logits one after another, of equals the lowest expert first."""
    row = tl.program_id(0).to(tl.int64)
    numbers = tl.arange(0, EXPERTS)
    found = tl.load(logits + row * stride_logits + numbers, mask=numbers < num_experts, other=-float("inf"))
    found = found.to(tl.float32)
    num_nan = tl.sum((found != found).to(tl.int32), 0)
    found = tl.where(found == found, found, -float("inf"))
    peak = tl.max(found, 0)
    peak = tl.where(peak == -float("inf"), 0.0, peak)
    exps = tl.exp(found - peak)
    left = numbers < num_experts
    total = 0.0
    for _ in tl.static_range(TOP_K):
        best = tl.max(tl.where(left, found, -float("inf")), 0)
        expert = tl.min(tl.where(left & (found == best), numbers, EXPERTS - 1), 0)
        left &= numbers != expert
        total += tl.sum(tl.where(numbers == expert, exps, 0.0), 0)
    if not RENORMALISE:
        total = tl.sum(exps, 0)
    total = tl.where(num_nan > 0, float("nan"), total)  # a broken token stays one, but its experts exist
    left = numbers < num_experts
    for choice in tl.static_range(TOP_K):
        best = tl.max(tl.where(left, found, -float("inf")), 0)
        expert = tl.min(tl.where(left & (found == best), numbers, EXPERTS - 1), 0)
        left &= numbers != expert
        tl.store(experts + row * TOP_K + choice, tl.minimum(expert, num_experts - 1))
        tl.store(weights + row * TOP_K + choice, tl.sum(tl.where(numbers == expert, exps, 0.0), 0) / total)


# the number of tokens changes every step: looked at, each kind of number would be compiled anew
@triton.jit(do_not_specialize=["num_slots"])
def _count_kernel(experts, counts, num_slots, TILE: tl.constexpr):
    """One program per expert: how many slots are its."""
    expert = tl.program_id(0)
    count = 0
    for begin in range(0, num_slots, TILE):
        here = begin + tl.arange(0, TILE)
        count += tl.sum((tl.load(experts + here, mask=here < num_slots, other=-1) == expert).to(tl.int32), 0)
    tl.store(counts + expert, count)


@triton.jit(do_not_specialize=["num_slots", "max_tiles"])
def _place_kernel(
    experts,
    counts,
    slots,
    tile_experts,
    num_slots,
    num_experts,
    max_tiles,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per expert: its slots in ascending order behind the tiles of the experts before it.

    A place without a slot holds `num_slots`, a tile without an expert -1.
    """
    expert = tl.program_id(0)
    numbers = tl.arange(0, EXPERTS)
    tiles_E = tl.cdiv(tl.load(counts + numbers, mask=numbers < num_experts, other=0), BLOCK)
    first_tile = tl.sum(tl.where(numbers < expert, tiles_E, 0), 0)
    end_tile = first_tile + tl.sum(tl.where(numbers == expert, tiles_E, 0), 0)
    placed = first_tile * BLOCK
    for begin in range(0, num_slots, TILE):
        here = begin + tl.arange(0, TILE)
        is_own = (tl.load(experts + here, mask=here < num_slots, other=-1) == expert).to(tl.int32)
        tl.store(slots + placed + tl.cumsum(is_own, 0) - 1, here, mask=is_own > 0)
        placed += tl.sum(is_own, 0)
    rest = placed + tl.arange(0, BLOCK)
    tl.store(slots + rest, num_slots, mask=rest < end_tile * BLOCK)
    for begin in range(first_tile, end_tile, TILE):
        tiles = begin + tl.arange(0, TILE)
        tl.store(tile_experts + tiles, expert, mask=tiles < end_tile)
    if expert == num_experts - 1:
        for begin in range(end_tile, max_tiles, TILE):
            tiles = begin + tl.arange(0, TILE)
            tl.store(tile_experts + tiles, -1, mask=tiles < max_tiles)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Order:
    """`slots` int32 [tiles × block], `num_slots` where there is none; `tile_experts` int32 [tiles], -1 for none."""

    slots: Tensor
    tile_experts: Tensor
    counts: Tensor  # int32 [E], slots of each expert
    block: int

    @staticmethod
    def empty(num_slots: int, num_experts: int, block: int, device: torch.device | str) -> Order:
        """Room for `num_slots` whatever experts they go to."""

        def new(size: int) -> Tensor:
            return torch.empty(size, dtype=torch.int32, device=device)

        tiles = max_tiles(num_slots, num_experts, block)
        return Order(slots=new(tiles * block), tile_experts=new(tiles), counts=new(num_experts), block=block)


def max_tiles(num_slots: int, num_experts: int, block: int) -> int:
    """The most tiles that `num_slots` can need: every expert that has any leaves a tile unfilled."""
    used = min(num_slots, num_experts)
    return (num_slots + used * (block - 1)) // block


def route(
    logits: Tensor,
    top_k: int,
    *,
    renormalise: bool = True,
    weights_out: Tensor | None = None,
    experts_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights float32 [T, K] and experts int32 [T, K] of the greatest of `logits` [T, E] of any float dtype.

    The weights are the softmax over all experts; `renormalise` divides them by their sum, as Mixtral does (Jiang et
    al., "Mixtral of experts", 2024), others do not. A NaN makes all weights of its token NaN.
    """
    num_tokens, num_experts = logits.shape
    shape = (num_tokens, top_k)
    weights = logits.new_empty(shape, dtype=torch.float32) if weights_out is None else weights_out
    experts = logits.new_empty(shape, dtype=torch.int32) if experts_out is None else experts_out
    assert 0 < top_k <= num_experts and logits.stride(1) == 1
    assert weights.shape == experts.shape == shape and weights.is_contiguous() and experts.is_contiguous()
    if num_tokens:
        _route_kernel[(num_tokens,)](
            logits,
            weights,
            experts,
            num_experts,
            logits.stride(0),
            TOP_K=top_k,
            RENORMALISE=renormalise,
            EXPERTS=triton.next_power_of_2(num_experts),
            num_warps=1,
        )
    return weights, experts


def order_by_expert(experts: Tensor, num_experts: int, block: int, *, out: Order | None = None) -> Order:
    """The slots of `experts` int32 [T, K] in tiles of `block`, a power of two, expert after expert."""
    num_slots = experts.numel()
    out = Order.empty(num_slots, num_experts, block, experts.device) if out is None else out
    assert out.block == block and len(out.tile_experts) >= max_tiles(num_slots, num_experts, block)
    assert experts.is_contiguous() and len(out.counts) == num_experts
    if num_slots:
        _count_kernel[(num_experts,)](experts, out.counts, num_slots, TILE=_TILE)
        _place_kernel[(num_experts,)](
            experts,
            out.counts,
            out.slots,
            out.tile_experts,
            num_slots,
            num_experts,
            len(out.tile_experts),
            BLOCK=block,
            EXPERTS=triton.next_power_of_2(num_experts),
            TILE=_TILE,
        )
    return out


BUILDS = (
    KernelBuild(
        name="moe_route_bf16_e8_k2",
        kernel=_route_kernel,
        signature={
            "logits": "*bf16",
            "weights": "*fp32",
            "experts": "*i32",
            "num_experts": "i32",
            "stride_logits": "i32",
        },
        constants={"TOP_K": 2, "RENORMALISE": True, "EXPERTS": 8},
        num_warps=1,
    ),
    KernelBuild(
        name="moe_count",
        kernel=_count_kernel,
        signature={"experts": "*i32", "counts": "*i32", "num_slots": "i32"},
        constants={"TILE": _TILE},
    ),
    KernelBuild(
        name="moe_place_e8_t16",
        kernel=_place_kernel,
        signature={
            **dict.fromkeys(("experts", "counts", "slots", "tile_experts"), "*i32"),
            **dict.fromkeys(("num_slots", "num_experts", "max_tiles"), "i32"),
        },
        constants={"BLOCK": 16, "EXPERTS": 8, "TILE": _TILE},
    ),
)
