# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Paged decode attention: one query token per row over the blocks of its sequence, split over the context.

Shapes: R rows, one sequence each; H query heads, G of them per KV head; M columns of the block table; P splits of a
context; D head_dim. For the layout of the cache see attention_tile.

All query heads of a KV head are one tile, so K and V are read once for the group. A context is cut into up to P splits
that are computed side by side and joined by their sums (Flash-Decoding: Dao, Haziza, Massa and Sizov, 2023). Grids
depend on R, H and P only: a captured graph stays right when lengths change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pageflight.kernels.attention_tile import (
    COUNTS,
    INDICES,
    NO_WINDOW,
    NUM_STAGES,
    TYPE_BYTES,
    attend,
    check_cache,
    check_integers,
    default_keys,
    padded,
    score_factors,
    signature,
    tile_constants,
)
from pageflight.kernels.builds import KernelBuild
from pageflight.kernels.tuning import AttentionTiles

KERNEL = "decode_attention"
MIN_ROWS = 16  # of a tile: the least that a tensor core multiplies
MAX_SPLITS = 64
MIN_KEYS_PER_SPLIT = 256  # below that, joining costs more than waiting
PROGRAMS_PER_SM = 2
NUM_WARPS = 4
SPLITS_PER_TILE = 16


@dataclass(frozen=True, slots=True)
class SplitWorkspace:
    """Where splits leave their parts until they are joined: `outputs_RHPD` and `lse_RHP`, float32, contiguous.

    It may have more rows than a call has. `lse` is the logarithm in base 2 of a split's softmax sum.
    """

    outputs_RHPD: Tensor
    lse_RHP: Tensor

    @property
    def num_splits(self) -> int:
        return self.outputs_RHPD.shape[2]

    @classmethod
    def empty(
        cls, num_rows: int, num_heads: int, num_splits: int, head_dim: int, device: torch.device
    ) -> SplitWorkspace:
        shape = (num_rows, num_heads, num_splits)
        return cls(torch.empty((*shape, head_dim), device=device), torch.empty(shape, device=device))


def choose_num_splits(num_rows: int, num_kv_heads: int, max_context_len: int, num_sms: int) -> int:
    """Splits that give every multiprocessor work, as far as contexts of `max_context_len` have enough keys for them.

    Depends on the number of rows: where a row's bits must not depend on its company, fix the number instead.
    """
    wanted = math.ceil(PROGRAMS_PER_SM * num_sms / (num_rows * num_kv_heads))
    return max(1, min(wanted, max_context_len // MIN_KEYS_PER_SPLIT, MAX_SPLITS))


def default_tiles(
    num_rows: int, num_kv_heads: int, head_dim: int, element_bytes: int, max_context_len: int, num_sms: int
) -> AttentionTiles:
    """Unmeasured: by the number of multiprocessors."""
    return AttentionTiles(
        keys=default_keys(head_dim, element_bytes),
        num_splits=choose_num_splits(num_rows, num_kv_heads, max_context_len, num_sms),
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )


def rows_per_tile(group: int) -> int:
    return max(MIN_ROWS, padded(group))


@triton.jit
def split_context(length, window, num_splits, KEYS: tl.constexpr):
    """First visible key, first key of the first tile, and keys of a split: whole tiles, alike for all splits."""
    first = tl.maximum(length - window, 0)
    begin = first // KEYS * KEYS
    tiles_per_split = tl.cdiv(tl.cdiv(length - begin, KEYS), num_splits)
    return first, begin, tl.maximum(tiles_per_split, 1) * KEYS


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=INDICES)
def decode_attention_kernel(
    queries,
    keys,
    values,
    tables,
    lens,
    output,
    split_outputs,
    split_lse,
    tokens,
    score_factor,
    soft_cap,
    value_scale,
    window,
    num_splits,
    stride_query_row,
    stride_query_head,
    stride_block,
    stride_kv_head,
    stride_token,
    stride_table,
    stride_output_row,
    stride_output_head,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lens + row).to(tl.int32)
    token = row
    if tokens is not None:
        if length == 0:
            return
        token = tl.load(tokens + row).to(tl.int64)
    first, begin, keys_per_split = split_context(length, window, num_splits, KEYS)
    start = begin + split * keys_per_split
    end = tl.minimum(start + keys_per_split, length)

    member, dims = tl.arange(0, ROWS), tl.arange(0, HEAD_PAD)
    head = kv_head * GROUP + member
    wanted = (member < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    place = token * stride_query_row + head[:, None] * stride_query_head + dims[None, :]
    weighted, maximum, total = attend(
        tl.load(queries + place, mask=wanted, other=0.0),
        tl.zeros((ROWS,), tl.int32) + first,
        tl.zeros((ROWS,), tl.int32) + end - 1,
        start,
        end,
        tables + row * stride_table,
        keys + kv_head * stride_kv_head,
        values + kv_head * stride_kv_head,
        stride_block,
        stride_token,
        score_factor,
        soft_cap,
        ROWS,
        KEYS,
        HEAD_DIM,
        HEAD_PAD,
        BLOCK_SIZE,
        HAS_SOFT_CAP,
    )
    result = weighted * (value_scale / tl.where(total == 0.0, 1.0, total))[:, None]
    if SPLIT:
        part = (row * tl.num_programs(1) * GROUP + head) * num_splits + split
        used = start < length  # the join never reads the others
        lse = maximum + tl.log2(tl.where(total == 0.0, 1.0, total))
        tl.store(split_outputs + part[:, None] * HEAD_DIM + dims[None, :], result, mask=wanted & used)
        tl.store(split_lse + part, lse, mask=(member < GROUP) & used)
    else:
        place = token * stride_output_row + head[:, None] * stride_output_head + dims[None, :]
        tl.store(output + place, result.to(output.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=INDICES)
def join_splits_kernel(
    split_outputs,
    split_lse,
    lens,
    tokens,
    output,
    window,
    num_splits,
    stride_output_row,
    stride_output_head,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lens + row).to(tl.int32)
    token = row
    if tokens is not None:
        if length == 0:
            return
        token = tl.load(tokens + row).to(tl.int64)
    _, begin, keys_per_split = split_context(length, window, num_splits, KEYS)
    num_used = tl.cdiv(length - begin, keys_per_split)
    dims = tl.arange(0, HEAD_PAD)
    first_part = (row * tl.num_programs(1) + head) * num_splits
    weighted = tl.zeros((HEAD_PAD,), tl.float32)
    maximum, total = -float("inf"), 0.0
    for start in range(0, num_used, SPLITS):
        split = start + tl.arange(0, SPLITS)
        used = split < num_used
        part = first_part + split
        lse = tl.load(split_lse + part, mask=used, other=float("-inf"))
        place = part[:, None] * HEAD_DIM + dims[None, :]
        parts = tl.load(split_outputs + place, mask=used[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        new_maximum = tl.maximum(maximum, tl.max(lse, 0))  # finite: the first split of a tile of splits has keys
        decay, weights = tl.exp2(maximum - new_maximum), tl.exp2(lse - new_maximum)
        weighted = weighted * decay + tl.sum(weights[:, None] * parts, 0)
        total = total * decay + tl.sum(weights, 0)
        maximum = new_maximum
    result = weighted / tl.where(total == 0.0, 1.0, total)
    place = token * stride_output_row + head * stride_output_head + dims
    tl.store(output + place, result.to(output.dtype.element_ty), mask=dims < HEAD_DIM)


def decode_attention(
    output_RHD: Tensor,
    queries_RHD: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    tables_RM: Tensor,
    lens_R: Tensor,
    *,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    workspace: SplitWorkspace | None = None,
    tiles: AttentionTiles | None = None,
    tokens_R: Tensor | None = None,
) -> None:
    """Attention of one new token per sequence, whose key is in the cache already. Writes `output_RHD`.

    `queries` and `output`: fp32, fp16 or bf16, may be views with any strides but for the last. K/V blocks: the same or
    fp8 e4m3, stored divided by `key_scale` and `value_scale`. `lens_R` counts keys of a row, its new one included; a
    row of length 0 gets zeros. Columns of `tables_RM` behind a row's last block are not read. `window` > 0: a token
    sees that many keys, itself included. `soft_cap` > 0: logits become cap × tanh(logit / cap). `workspace` splits
    contexts into as many parts as it has; None computes each in one. `tiles` says all but that; None is unmeasured.
    `tokens_R`: where the rows' tokens are among more queries; rows of length 0 are left alone then.
    """
    (_, num_heads, head_dim), num_rows = queries_RHD.shape, len(lens_R)
    check_cache(key_blocks, value_blocks, num_heads, head_dim)
    check_integers(tables_RM, lens_R)
    assert output_RHD.shape == queries_RHD.shape and queries_RHD.stride(2) == output_RHD.stride(2) == 1
    assert len(tables_RM) == num_rows == len(queries_RHD if tokens_R is None else tokens_R)
    num_kv_heads, block_size = key_blocks.shape[1:3]
    group, element_bytes = num_heads // num_kv_heads, key_blocks.element_size()
    if workspace is None:
        num_splits, outputs, lse = 1, None, None
    else:
        num_splits, outputs, lse = workspace.num_splits, workspace.outputs_RHPD, workspace.lse_RHP
        assert outputs.is_contiguous() and lse.is_contiguous() and lse.shape == outputs.shape[:3]
        assert len(outputs) >= num_rows and outputs.shape[1] == num_heads and outputs.shape[3] == head_dim
    factor, cap = score_factors(scale, key_scale, soft_cap)
    window = window or NO_WINDOW
    keys = default_keys(head_dim, element_bytes) if tiles is None else tiles.keys
    warps, stages = (NUM_WARPS, NUM_STAGES) if tiles is None else (tiles.num_warps, tiles.num_stages)
    tile = tile_constants(head_dim, keys)
    decode_attention_kernel[(num_rows, num_kv_heads, num_splits)](
        queries_RHD,
        key_blocks,
        value_blocks,
        tables_RM,
        lens_R,
        output_RHD,
        outputs,
        lse,
        tokens_R,
        factor,
        cap,
        value_scale,
        window,
        num_splits,
        *queries_RHD.stride()[:2],
        *key_blocks.stride()[:3],
        tables_RM.stride(0),
        *output_RHD.stride()[:2],
        GROUP=group,
        ROWS=rows_per_tile(group),
        BLOCK_SIZE=block_size,
        HAS_SOFT_CAP=soft_cap > 0,
        SPLIT=workspace is not None,
        num_warps=warps,
        num_stages=stages,
        **tile,
    )
    if workspace is not None:
        join_splits_kernel[(num_rows, num_heads)](
            outputs,
            lse,
            lens_R,
            tokens_R,
            output_RHD,
            window,
            num_splits,
            *output_RHD.stride()[:2],
            SPLITS=SPLITS_PER_TILE,
            num_warps=NUM_WARPS,
            **tile,
        )


def _decode_build(
    dtype: str,
    cache_dtype: str,
    head_dim: int,
    group: int,
    *,
    split: bool,
    soft_cap: bool = False,
    among: bool = False,
) -> KernelBuild:
    constants = tile_constants(head_dim, default_keys(head_dim, TYPE_BYTES[cache_dtype])) | {
        "GROUP": group,
        "ROWS": rows_per_tile(group),
        "BLOCK_SIZE": 32,
        "HAS_SOFT_CAP": soft_cap,
        "SPLIT": split,
    }
    if not split:
        constants |= {"split_outputs": None, "split_lse": None}
    if not among:
        constants |= {"tokens": None}
    pointers = {"queries": dtype, "keys": cache_dtype, "values": cache_dtype, "output": dtype}
    pointers |= {"tables": "i32", "lens": "i32", "tokens": "i32", "split_outputs": "fp32", "split_lse": "fp32"}
    form = ("_split" if split else "") + ("_soft_cap" if soft_cap else "") + ("_among" if among else "")
    return KernelBuild(
        name=f"decode_attention_{dtype}_cache_{cache_dtype}_d{head_dim}_g{group}{form}",
        kernel=decode_attention_kernel,
        signature=signature(decode_attention_kernel.arg_names, pointers, constants),
        constants=constants,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
        min_capability=89 if cache_dtype == "fp8e4nv" else 80,
    )


def _join_build(dtype: str, head_dim: int) -> KernelBuild:
    constants = tile_constants(head_dim, default_keys(head_dim, TYPE_BYTES[dtype])) | {"SPLITS": SPLITS_PER_TILE}
    constants |= {"tokens": None}
    pointers = {"split_outputs": "fp32", "split_lse": "fp32", "lens": "i32", "output": dtype}
    return KernelBuild(
        name=f"join_splits_{dtype}_d{head_dim}",
        kernel=join_splits_kernel,
        signature=signature(join_splits_kernel.arg_names, pointers, constants),
        constants=constants,
        num_warps=NUM_WARPS,
    )


BUILDS = (
    _decode_build("bf16", "bf16", 128, 4, split=True),
    _decode_build("bf16", "bf16", 128, 4, split=False),
    _decode_build("bf16", "fp8e4nv", 128, 8, split=True),
    _decode_build("bf16", "bf16", 128, 4, split=True, among=True),
    _decode_build("fp16", "fp16", 64, 8, split=True),
    _decode_build("bf16", "bf16", 256, 2, split=True, soft_cap=True),
    _decode_build("bf16", "bf16", 80, 1, split=True),
    _decode_build("fp32", "fp32", 128, 4, split=True),
    _join_build("bf16", 128),
)
