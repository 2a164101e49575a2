# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""One tile of queries over the keys in a sequence's blocks: what decode and mixed attention share.

Shapes: M rows of a tile (query × query head of one KV head), K keys of a tile, D head_dim padded to a power of two.

The cache of one layer is two tensors of the same shape and strides, `key_blocks` and `value_blocks`
[num_blocks, kv heads, block size, head_dim], the last dimension contiguous: parts [layer, 0] and [layer, 1] of one
tensor [layers, 2, num_blocks, kv heads, block size, head_dim]. The keys of a block and head lie together, so a tile
of keys is a few runs of block size × head_dim elements, and copying a block is one run per layer, kind and block.

Softmax is computed online (Milakov and Gimelshein, 2018) in float32 with powers of two, as in FlashAttention (Dao et
al., 2022); products have the queries' type and add up in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = math.log2(math.e)
FLOATS = {"score_factor", "soft_cap", "value_scale", "inverse_key_scale", "inverse_value_scale"}
TYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8e4nv": 1}
NUM_STAGES = 5  # K and V wait for block ids: that takes five to have a tile on its way while another is multiplied
COUNTS = ["num_tokens", "num_sequences", "num_splits", "window", "most_keys"]
"""Arguments that change while serving: a kernel made for their value would be compiled in the middle of it."""
INDICES = ["tables", "lens", "tokens", "token_begins", "past_lens", "positions", "slots", "source_ids", "target_ids"]
"""Pointers that may be parts of a buffer, at any element."""
NO_WINDOW = 2**31 - 1  # larger than any context, and subtracting it from a position still fits 32 bits


@triton.jit
def attend(
    queries,  # [M, D]
    first_visible,  # [M] first key that a row may see
    last_visible,  # [M] last key that a row may see
    begin,  # first key of the first tile
    end,  # one past the last key that any row may see
    table,  # block ids of the sequence
    keys,  # key blocks of the KV head
    values,
    stride_block,
    stride_token,
    score_factor,
    soft_cap,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
):
    """Weighted values [M, D], not divided yet, with maximum and sum [M] of the softmax in base 2.

    Rows that see no key get zeros, maximum -inf and sum 0.
    """
    dims = tl.arange(0, HEAD_PAD)
    within_head = dims[None, :] < HEAD_DIM
    weighted = tl.zeros((ROWS, HEAD_PAD), tl.float32)
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        exists = key < end
        block = tl.load(table + key // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
        offset = block * stride_block + (key % BLOCK_SIZE) * stride_token
        # Values of keys that do not exist must be zeros: a weight of 0 times a stale NaN is NaN.
        place, wanted = offset[:, None] + dims[None, :], exists[:, None] & within_head
        k = tl.load(keys + place, mask=wanted, other=0.0).to(queries.dtype)
        v = tl.load(values + place, mask=wanted, other=0.0).to(queries.dtype)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * score_factor
        if HAS_SOFT_CAP:  # cap × tanh(x) with powers that cannot overflow: e = 2^(-2 |x| log2 e)
            power = tl.exp2(-tl.abs(scores))
            bent = soft_cap * (1.0 - power) / (1.0 + power)
            scores = tl.where(scores < 0.0, -bent, bent)
        visible = (key[None, :] >= first_visible[:, None]) & (key[None, :] <= last_visible[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # -inf - -inf is NaN
        weights = tl.exp2(scores - reference[:, None])
        decay = tl.exp2(maximum - reference)
        total = total * decay + tl.sum(weights, 1)
        weighted = tl.dot(weights.to(v.dtype), v, weighted * decay[:, None], input_precision="ieee")
        maximum = new_maximum
    return weighted, maximum, total


def padded(count: int) -> int:
    """The least power of two that holds `count`: what a tile's dimension must be."""
    return 1 << (count - 1).bit_length()


def score_factors(scale: float, key_scale: float, soft_cap: float) -> tuple[float, float]:
    """What `attend` multiplies products with, and its cap, both with the change to base 2 folded in."""
    if soft_cap > 0:
        return 2 * LOG2_E * scale * key_scale / soft_cap, soft_cap * LOG2_E
    return scale * key_scale * LOG2_E, 0.0


def check_cache(key_blocks: Tensor, value_blocks: Tensor, num_heads: int, head_dim: int) -> None:
    """Asserts that a layer's blocks have the layout that the kernels read and write."""
    assert key_blocks.dim() == 4 and key_blocks.shape == value_blocks.shape, "[num_blocks, kv heads, block size, D]"
    assert key_blocks.stride() == value_blocks.stride() and key_blocks.stride(3) == 1, "K and V are laid out alike"
    assert key_blocks.dtype == value_blocks.dtype, "K and V have one type"
    _, num_kv_heads, block_size, cached_dim = key_blocks.shape
    assert cached_dim == head_dim, f"head_dim {head_dim}, cache {cached_dim}"
    assert num_heads % num_kv_heads == 0, f"{num_heads} query heads, {num_kv_heads} KV heads"
    assert block_size & (block_size - 1) == 0, f"block size {block_size} is not a power of two"


def check_integers(*tensors: Tensor) -> None:
    """Asserts that index tensors are contiguous in their last dimension and of 32 or 64 bits."""
    for tensor in tensors:
        assert tensor.dtype in (torch.int32, torch.int64) and tensor.stride(-1) == 1, tensor.dtype


def signature(names: Sequence[str], pointers: Mapping[str, str], constants: Mapping[str, Any]) -> dict[str, str]:
    """Types of a kernel's arguments `names`: what is neither a pointer, a constant nor in FLOATS is an integer."""
    others = {name: "fp32" if name in FLOATS else "i32" for name in names if name not in constants}
    return others | {name: f"*{element}" for name, element in pointers.items() if name not in constants}


def default_keys(head_dim: int, element_bytes: int, max_keys: int = 128) -> int:
    """Unmeasured: keys of a tile of 16 KiB of K, 32 at least."""
    return min(max_keys, max(32, (16 << 10) // (padded(head_dim) * element_bytes)))


def tile_constants(head_dim: int, keys: int) -> dict[str, Any]:
    """Constants that depend on the head and the keys of a tile."""
    return {"KEYS": keys, "HEAD_DIM": head_dim, "HEAD_PAD": padded(head_dim)}
