"""Attention over K/V blocks by the definition: gathered, in float64, one sequence at a time.

Shapes: S sequences, n queries of one, H query heads, C KV heads, N blocks, B block size, M table columns, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values of several contexts, scattered over blocks; what belongs to none is NaN."""

    key_blocks: Tensor  # [N, C, B, D]
    value_blocks: Tensor
    tables_SM: Tensor

    def context(self, sequence: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a sequence as stored, float64 [length, C, D]."""
        ids = self.tables_SM[sequence].long().clamp(min=0)
        keys, values = (
            blocks[ids].double().transpose(1, 2).flatten(0, 1)[:length]
            for blocks in (self.key_blocks, self.value_blocks)
        )
        return keys, values


def make_cache(
    lens: list[int],
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Cache:
    """A cache with contexts of `lens` keys, in blocks of random order; unused columns of the tables are -1."""
    counts = [-(-length // block_size) for length in lens]
    num_blocks = sum(counts) + 2
    blocks = torch.full((2, num_blocks, num_kv_heads, block_size, head_dim), torch.nan)
    order = torch.randperm(num_blocks, generator=generator)
    tables_SM = torch.full((len(lens), max(counts) + 1), -1, dtype=torch.int32)
    used = 0
    for row, length, count in zip(tables_SM, lens, counts, strict=True):
        row[:count] = order[used : used + count]
        for position in range(length):
            cell = blocks[:, int(row[position // block_size]), :, position % block_size]
            cell.copy_(torch.randn(cell.shape, generator=generator))
        used += count
    stored = blocks.to(dtype)
    return Cache(stored[0], stored[1], tables_SM)


def attention(
    queries_nHD: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    past_len: int,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """Causal attention, float64 [n, H, D], of queries at positions from `past_len` on to keys [length, C, D]."""
    num_queries, num_heads, _ = queries_nHD.shape
    group = num_heads // keys.shape[1]
    keys, values = (part.repeat_interleave(group, 1) for part in (keys, values))
    logits = torch.einsum("nhd,khd->hnk", queries_nHD.double(), keys) * scale
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    position, key = past_len + torch.arange(num_queries)[:, None], torch.arange(len(keys))[None]
    visible = key <= position
    if window:
        visible &= key > position - window
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hnk,khd->nhd", weights, values)
