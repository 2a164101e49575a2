"""Attention measured: which tiles and splits are tried on a card, and which of them a runner takes.

Shapes as in attention_decode and attention_mixed.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton

from pageflight.kernels import attention_decode, attention_mixed
from pageflight.kernels.attention_decode import SplitWorkspace, decode_attention
from pageflight.kernels.attention_mixed import mixed_attention
from pageflight.kernels.tuning import AttentionTiles, Problem, attention_key, attention_tiles_of


def measured_tiles(
    queries: torch.dtype,
    cache: torch.dtype,
    num_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_context_len: int,
    device: torch.device,
) -> AttentionTiles | None:
    """What was fastest on this GPU: at the longest measured context that is not beyond `max_context_len`, for such an
    engine serves shorter ones as well. Splits that so short a context cannot fill are left out."""
    sizes = (num_heads, num_kv_heads, head_dim)
    context = 1 << (max_context_len.bit_length() - 1)
    while context >= attention_decode.MIN_KEYS_PER_SPLIT:
        key = attention_key(attention_decode.KERNEL, queries, cache, num_rows, *sizes, context=context)
        if (tiles := attention_tiles_of(device, key)) is not None:
            return replace(
                tiles, num_splits=min(tiles.num_splits, max(1, max_context_len // attention_decode.MIN_KEYS_PER_SPLIT))
            )
        context //= 2
    return None


def decode_candidates(default: AttentionTiles) -> tuple[AttentionTiles, ...]:
    """Tiles worth measuring: half, as many and twice as many splits and keys as the default has."""
    splits = sorted(
        {
            1,
            max(1, default.num_splits // 2),
            default.num_splits,
            min(attention_decode.MAX_SPLITS, 2 * default.num_splits),
        }
    )
    return tuple(
        AttentionTiles(keys=keys, num_splits=num_splits, num_warps=num_warps, num_stages=num_stages)
        for num_splits in splits
        for keys in sorted({max(16, default.keys // 2), default.keys, min(128, 2 * default.keys)})
        for num_warps in (4, 8)
        for num_stages in (3, 5)
    )


def decode_problem(
    dtype: torch.dtype,
    cache: torch.dtype,
    num_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    context: int,
    *,
    num_sms: int,
    device: torch.device,
    block_size: int = 32,
) -> Problem:
    """What `tuning.tune` measures: rows whose contexts are from an eighth of `context` to all of it, in any blocks."""
    columns = triton.cdiv(context, block_size)
    shape = (num_rows * columns, num_kv_heads, block_size, head_dim)
    keys, values = (torch.zeros(shape, device=device, dtype=torch.float16).to(cache) for _ in "kv")
    tables = torch.randperm(len(keys), device=device).to(torch.int32).view(num_rows, columns)
    lens = torch.linspace(max(1, context // 8), context, num_rows, device=device).to(torch.int32)
    queries = torch.zeros(num_rows, num_heads, head_dim, dtype=dtype, device=device)
    output = torch.empty_like(queries)
    workspaces: dict[int, SplitWorkspace] = {}

    def launch(tiles: AttentionTiles) -> None:
        workspace = None
        if tiles.num_splits > 1:
            if tiles.num_splits not in workspaces:  # none is made in a call that is timed
                sizes = (num_rows, num_heads, tiles.num_splits, head_dim)
                workspaces[tiles.num_splits] = SplitWorkspace.empty(*sizes, device)
            workspace = workspaces[tiles.num_splits]
        decode_attention(
            output,
            queries,
            keys,
            values,
            tables,
            lens,
            scale=head_dim**-0.5,
            workspace=workspace,
            tiles=tiles,
        )

    default = attention_decode.default_tiles(num_rows, num_kv_heads, head_dim, keys.element_size(), context, num_sms)
    sizes = (num_heads, num_kv_heads, head_dim)
    key = attention_key(attention_decode.KERNEL, dtype, cache, num_rows, *sizes, context=context)
    return Problem(key=key, candidates=decode_candidates(default), launch=launch)


def prompt_candidates(default: AttentionTiles) -> tuple[AttentionTiles, ...]:
    """Tiles worth measuring."""
    return tuple(
        AttentionTiles(keys=keys, num_warps=warps, num_stages=stages)
        for keys in sorted({max(16, default.keys // 2), default.keys, min(128, 2 * default.keys)})
        for warps in (4, 8)
        for stages in (2, 3, 5)
    )


def prompt_problem(
    dtype: torch.dtype,
    cache: torch.dtype,
    num_queries: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    device: torch.device,
    block_size: int = 32,
) -> Problem:
    """What `tuning.tune` measures: one chunk of so many queries behind as many keys."""
    columns = triton.cdiv(2 * num_queries, block_size)
    shape = (columns, num_kv_heads, block_size, head_dim)
    keys, values = (torch.zeros(shape, device=device, dtype=torch.float16).to(cache) for _ in "kv")
    tables = torch.randperm(columns, device=device).to(torch.int32).view(1, columns)
    begins = torch.tensor([0, num_queries], dtype=torch.int32, device=device)
    past = torch.full((1,), num_queries, dtype=torch.int32, device=device)
    queries = torch.zeros(num_queries, num_heads, head_dim, dtype=dtype, device=device)
    output = torch.empty_like(queries)

    def launch(tiles: AttentionTiles) -> None:
        scale, longest = head_dim**-0.5, num_queries
        placed = (tables, begins, past)
        mixed_attention(output, queries, keys, values, *placed, max_query_len=longest, scale=scale, tiles=tiles)

    rows = attention_mixed.rows_per_tile(num_heads // num_kv_heads, num_queries, head_dim, queries.element_size())
    key = attention_key(attention_mixed.KERNEL, dtype, cache, num_queries, num_heads, num_kv_heads, head_dim)
    default = attention_mixed.default_tiles(rows, head_dim, keys.element_size())
    return Problem(key=key, candidates=prompt_candidates(default), launch=launch)
