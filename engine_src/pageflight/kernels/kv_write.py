# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Rotary embedding of queries and keys, and new keys and values into their blocks, in one pass over `qkv`.

Shapes: T tokens, H query heads, C KV heads, D head_dim, F = (H + 2 C) × D features, P positions. For the layout of
the cache see attention_tile.

Feature i of a head is turned with feature i + D/2 (Su et al., RoFormer, 2021, in the order of GPT-NeoX), in float32 and
rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pageflight.kernels.attention_tile import INDICES, check_cache, check_integers, padded, signature
from pageflight.kernels.builds import KernelBuild

FP8_MAX = 448.0  # of e4m3
HEADS_PER_PROGRAM = 8


def num_warps(head_dim: int) -> int:
    """Warps whose threads load eight elements of each half at a time: 16 bytes of fp16 or bf16."""
    return max(1, HEADS_PER_PROGRAM * padded(head_dim // 2) // 256)


@triton.jit(do_not_specialize_on_alignment=INDICES)
def rope_and_write_kernel(
    qkv,
    cosines,
    sines,
    positions,
    slots,
    queries,
    keys,
    values,
    inverse_key_scale,
    inverse_value_scale,
    stride_qkv,
    stride_table,
    stride_query_token,
    stride_query_head,
    stride_block,
    stride_kv_head,
    stride_token,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    LIMIT: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        head, dims = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, HALF_PAD)
        is_query, is_value = head < NUM_HEADS, head >= NUM_HEADS + NUM_KV_HEADS
        exists = (dims < HALF)[None, :]
        wanted = (head < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & exists
        source = qkv + token * stride_qkv + head[:, None] * HEAD_DIM + dims[None, :]
        first = tl.load(source, mask=wanted, other=0.0).to(tl.float32)
        second = tl.load(source + HALF, mask=wanted, other=0.0).to(tl.float32)

        angle = tl.load(positions + token).to(tl.int64) * stride_table + dims
        cosine = tl.load(cosines + angle, mask=dims < HALF, other=0.0).to(tl.float32)
        sine = tl.load(sines + angle, mask=dims < HALF, other=0.0).to(tl.float32)
        cosine = tl.where(is_value[:, None], 1.0, cosine[None, :])  # values are not turned
        sine = tl.where(is_value[:, None], 0.0, sine[None, :])
        turned_first, turned_second = first * cosine - second * sine, second * cosine + first * sine

        target = queries + token * stride_query_token + head[:, None] * stride_query_head + dims[None, :]
        to_query = is_query[:, None] & exists
        tl.store(target, turned_first.to(queries.dtype.element_ty), mask=to_query)
        tl.store(target + HALF, turned_second.to(queries.dtype.element_ty), mask=to_query)

        if LIMIT > 0:
            factor = tl.where(is_value, inverse_value_scale, inverse_key_scale)[:, None]
            turned_first = tl.clamp(turned_first * factor, -LIMIT, LIMIT, tl.PropagateNan.ALL)
            turned_second = tl.clamp(turned_second * factor, -LIMIT, LIMIT, tl.PropagateNan.ALL)
        kv_head = (head - NUM_HEADS) % NUM_KV_HEADS
        cell = slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_token
        place = cell + kv_head[:, None] * stride_kv_head + dims[None, :]
        to_key, to_value = (~is_query & ~is_value)[:, None] & exists, is_value[:, None] & wanted
        cached_first = turned_first.to(keys.dtype.element_ty)
        cached_second = turned_second.to(keys.dtype.element_ty)
        tl.store(keys + place, cached_first, mask=to_key)
        tl.store(keys + place + HALF, cached_second, mask=to_key)
        tl.store(values + place, cached_first, mask=to_value)
        tl.store(values + place + HALF, cached_second, mask=to_value)


def rope_and_write(
    queries_THD: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    qkv_TF: Tensor,
    cosines_PD: Tensor,
    sines_PD: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Turn queries and keys of `qkv_TF` by their positions; write `queries_THD` and the cells `slots_T` of the blocks.

    `qkv_TF`: fp32, fp16 or bf16, heads of queries, then of keys, then of values. `queries_THD` may be the first H heads
    of `qkv_TF` itself: a thread reads both features of a pair before it writes them. The slot of a token is its block
    times the block size plus its place in the block; a token with slot -1 is padding and writes nothing, and its
    position is not read. `cosines_PD` and `sines_PD` are rows of `models.rope.rope_tables` in any float type, of which
    the first half is read. Blocks of fp8 e4m3 hold K / `key_scale` and V / `value_scale`, saturated at ±448; the scales
    are ignored elsewhere.
    """
    num_tokens, num_heads, head_dim = queries_THD.shape
    check_cache(key_blocks, value_blocks, num_heads, head_dim)
    check_integers(positions_T, slots_T)
    num_kv_heads, block_size = key_blocks.shape[1:3]
    num_all_heads = num_heads + 2 * num_kv_heads
    assert qkv_TF.shape == (num_tokens, num_all_heads * head_dim) and qkv_TF.stride(1) == queries_THD.stride(2) == 1
    assert head_dim % 2 == 0 and cosines_PD.shape[1] >= head_dim // 2, "pairs of features"
    assert cosines_PD.stride() == sines_PD.stride() and cosines_PD.stride(1) == 1
    rope_and_write_kernel[(num_tokens, triton.cdiv(num_all_heads, HEADS_PER_PROGRAM))](
        qkv_TF,
        cosines_PD,
        sines_PD,
        positions_T,
        slots_T,
        queries_THD,
        key_blocks,
        value_blocks,
        1.0 / key_scale,
        1.0 / value_scale,
        qkv_TF.stride(0),
        cosines_PD.stride(0),
        *queries_THD.stride()[:2],
        *key_blocks.stride()[:3],
        num_warps=num_warps(head_dim),
        **_constants(num_heads, num_kv_heads, head_dim, block_size, key_blocks.dtype == torch.float8_e4m3fn),
    )


def _constants(num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, fp8: bool) -> dict[str, Any]:
    return {
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "HALF_PAD": padded(head_dim // 2),
        "BLOCK_SIZE": block_size,
        "HEADS": HEADS_PER_PROGRAM,
        "LIMIT": FP8_MAX if fp8 else 0.0,
    }


def _build(dtype: str, cache_dtype: str, num_heads: int, num_kv_heads: int, head_dim: int) -> KernelBuild:
    fp8 = cache_dtype == "fp8e4nv"
    constants = _constants(num_heads, num_kv_heads, head_dim, 32, fp8)
    pointers = {"qkv": dtype, "queries": dtype, "keys": cache_dtype, "values": cache_dtype}
    pointers |= {"cosines": "fp32", "sines": "fp32", "positions": "i64", "slots": "i64"}
    return KernelBuild(
        name=f"rope_and_write_{dtype}_cache_{cache_dtype}_d{head_dim}",
        kernel=rope_and_write_kernel,
        signature=signature(rope_and_write_kernel.arg_names, pointers, constants),
        constants=constants,
        num_warps=num_warps(head_dim),
        min_capability=89 if fp8 else 80,
    )


BUILDS = (
    _build("bf16", "bf16", 32, 8, 128),
    _build("bf16", "fp8e4nv", 32, 8, 128),
    _build("fp16", "fp16", 14, 2, 64),
    _build("bf16", "bf16", 32, 32, 80),
)
