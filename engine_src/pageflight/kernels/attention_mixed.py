# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Paged attention of prompt chunks and decode tokens in one launch.

Shapes: T packed query tokens, S sequences, H query heads, G of them per KV head; M columns of the block table; D
head_dim. For the layout of the cache see attention_tile.

A tile is a few consecutive queries of one sequence with all query heads of a KV head. Sequence s gets its tiles from
number token_begins[s] // queries per tile + s on: as many as it can need, found by bisection on the GPU. The grid
depends on T and S only; tiles that no sequence needs end at once.
"""

from __future__ import annotations

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
from pageflight.kernels.tuning import AttentionTiles, attention_key, attention_tiles_of

KERNEL = "mixed_attention"
MIN_ROWS, MAX_ROWS = 16, 128
MAX_KEYS = 64  # of a tile: scores of more would not fit into registers beside the sums


def rows_per_tile(group: int, max_query_len: int, head_dim: int, element_bytes: int) -> int:
    """Rows of a tile: as many as the longest chunk fills, while what a thread adds up fits into its registers.

    `element_bytes` are those of queries; products of four bytes have no tensor cores and keep more in registers.
    """
    most = MAX_ROWS if head_dim <= 128 else MAX_ROWS // 2
    if element_bytes == 4:
        most = MIN_ROWS
    wanted = min(padded(max_query_len * group), most)
    return max(MIN_ROWS, padded(group), wanted)


def default_tiles(rows: int, head_dim: int, element_bytes: int) -> AttentionTiles:
    """Unmeasured. `rows`: of a tile; `element_bytes`: of the cache."""
    keys = default_keys(head_dim, element_bytes, MAX_KEYS)
    return AttentionTiles(keys=keys, num_warps=num_warps(rows), num_stages=num_stages(head_dim))


def num_warps(rows: int) -> int:
    """Warps of a tile: on Hopper four of them multiply 64 rows together."""
    return 8 if rows >= 128 else 4


def num_stages(head_dim: int) -> int:
    """As in decode, but for heads whose queries leave no room for that in 99 KiB of shared memory."""
    return NUM_STAGES if head_dim <= 128 else 3


@triton.jit
def find_sequence(token_begins, num_sequences, tile, QUERIES: tl.constexpr):
    """The sequence whose tiles include `tile`; `num_sequences` for those of the tokens behind the last one."""
    low, high = 0, num_sequences
    while low < high:
        middle = (low + high + 1) // 2
        begins_here = tl.load(token_begins + middle).to(tl.int32) // QUERIES + middle <= tile
        low = tl.where(begins_here, middle, low)
        high = tl.where(begins_here, high, middle - 1)
    return low


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=INDICES)
def mixed_attention_kernel(
    queries,
    keys,
    values,
    tables,
    token_begins,
    past_lens,
    output,
    score_factor,
    soft_cap,
    value_scale,
    window,
    num_tokens,
    num_sequences,
    most_keys,
    stride_query_token,
    stride_query_head,
    stride_block,
    stride_kv_head,
    stride_token,
    stride_table,
    stride_output_token,
    stride_output_head,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
):
    QUERIES: tl.constexpr = ROWS // GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # late queries see most keys: they start first
    kv_head = tl.program_id(1)
    found = find_sequence(token_begins, num_sequences, tile, QUERIES)
    is_sequence = found < num_sequences
    sequence = tl.minimum(found, num_sequences - 1)
    query_begin = tl.load(token_begins + found).to(tl.int32)
    query_end = tl.load(token_begins + sequence + 1).to(tl.int32)
    query_end = tl.where(is_sequence, query_end, num_tokens)
    first_query = query_begin + (tile - query_begin // QUERIES - found) * QUERIES
    # A row that decodes behind more keys is somebody else's.
    is_left = is_sequence & (query_end - query_begin == 1) & (tl.load(past_lens + sequence).to(tl.int32) >= most_keys)
    if (first_query < query_end) & (not is_left):
        row, dims = tl.arange(0, ROWS), tl.arange(0, HEAD_PAD)
        query, head = first_query + row // GROUP, kv_head * GROUP + row % GROUP
        real = (row < QUERIES * GROUP) & (query < query_end)
        wanted = real[:, None] & (dims < HEAD_DIM)[None, :]
        token = query.to(tl.int64)[:, None]
        place = token * stride_query_token + head[:, None] * stride_query_head + dims[None, :]

        past_len = tl.load(past_lens + sequence).to(tl.int32) - query_begin  # position of a query less its index
        position = past_len + query
        first_visible = tl.maximum(position - window + 1, 0)
        begin = tl.maximum(past_len + first_query - window + 1, 0) // KEYS * KEYS
        end = past_len + tl.minimum(first_query + QUERIES, query_end)
        weighted, _, total = attend(
            tl.load(queries + place, mask=wanted, other=0.0),
            first_visible,
            position,
            begin,
            tl.where(is_sequence, end, 0),
            tables + sequence.to(tl.int64) * stride_table,
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
        place = token * stride_output_token + head[:, None] * stride_output_head + dims[None, :]
        tl.store(output + place, result.to(output.dtype.element_ty), mask=wanted)


def mixed_attention(
    output_THD: Tensor,
    queries_THD: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    tables_SM: Tensor,
    token_begins: Tensor,
    past_lens_S: Tensor,
    *,
    max_query_len: int,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    tiles: AttentionTiles | None = None,
    most_keys: int = NO_WINDOW,
) -> None:
    """Causal attention of every sequence's new tokens to its cached ones, the new included. Writes `output_THD`.

    Queries of sequence s are `queries_THD[token_begins[s] : token_begins[s + 1]]`, at positions from `past_lens_S[s]`
    on; their keys are in the cache already. Sequences may have no query; tokens from `token_begins[S]` on are padding
    and get zeros. `max_query_len`: an upper bound of the queries of a sequence, which only chooses the tile. `tiles`
    None takes those measured on this GPU, else `default_tiles`. Sequences of one query that sees more than `most_keys`
    keys are left alone: `decode_attention` splits their contexts. Types, strides, `window`, `soft_cap` and the scales
    are those of `decode_attention`.
    """
    num_tokens, num_heads, head_dim = queries_THD.shape
    check_cache(key_blocks, value_blocks, num_heads, head_dim)
    check_integers(tables_SM, token_begins, past_lens_S)
    assert output_THD.shape == queries_THD.shape and queries_THD.stride(2) == output_THD.stride(2) == 1
    num_sequences = len(past_lens_S)
    assert len(tables_SM) == num_sequences and len(token_begins) == num_sequences + 1
    num_kv_heads, block_size = key_blocks.shape[1:3]
    group, element_bytes = num_heads // num_kv_heads, key_blocks.element_size()
    rows = rows_per_tile(group, max_query_len, head_dim, queries_THD.element_size())
    if tiles is None:
        sizes = (num_heads, num_kv_heads, head_dim)
        key = attention_key(KERNEL, queries_THD.dtype, key_blocks.dtype, max_query_len, *sizes)
        tiles = attention_tiles_of(queries_THD.device, key) or default_tiles(rows, head_dim, element_bytes)
    factor, cap = score_factors(scale, key_scale, soft_cap)
    num_tiles = num_tokens // (rows // group) + num_sequences + 1
    mixed_attention_kernel[(num_tiles, num_kv_heads)](
        queries_THD,
        key_blocks,
        value_blocks,
        tables_SM,
        token_begins,
        past_lens_S,
        output_THD,
        factor,
        cap,
        value_scale,
        window or NO_WINDOW,
        num_tokens,
        num_sequences,
        most_keys,
        *queries_THD.stride()[:2],
        *key_blocks.stride()[:3],
        tables_SM.stride(0),
        *output_THD.stride()[:2],
        GROUP=group,
        ROWS=rows,
        BLOCK_SIZE=block_size,
        HAS_SOFT_CAP=soft_cap > 0,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **tile_constants(head_dim, tiles.keys),
    )


def _build(
    dtype: str, cache_dtype: str, head_dim: int, group: int, max_query_len: int, *, soft_cap: bool = False
) -> KernelBuild:
    rows = rows_per_tile(group, max_query_len, head_dim, TYPE_BYTES[dtype])
    tiles = default_tiles(rows, head_dim, TYPE_BYTES[cache_dtype])
    constants = tile_constants(head_dim, tiles.keys) | {
        "GROUP": group,
        "ROWS": rows,
        "BLOCK_SIZE": 32,
        "HAS_SOFT_CAP": soft_cap,
    }
    pointers = {"queries": dtype, "keys": cache_dtype, "values": cache_dtype, "output": dtype}
    pointers |= dict.fromkeys(("tables", "token_begins", "past_lens"), "i32")
    form = f"r{rows}" + ("_soft_cap" if soft_cap else "")
    return KernelBuild(
        name=f"mixed_attention_{dtype}_cache_{cache_dtype}_d{head_dim}_g{group}_{form}",
        kernel=mixed_attention_kernel,
        signature=signature(mixed_attention_kernel.arg_names, pointers, constants),
        constants=constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        min_capability=89 if cache_dtype == "fp8e4nv" else 80,
    )


BUILDS = (
    _build("bf16", "bf16", 128, 4, 512),
    _build("bf16", "bf16", 128, 4, 4),
    _build("bf16", "fp8e4nv", 128, 8, 512),
    _build("fp16", "fp16", 64, 7, 512),
    _build("bf16", "bf16", 256, 2, 512, soft_cap=True),
    _build("fp32", "fp32", 128, 4, 512),
)
