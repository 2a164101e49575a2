"""Attention, and what is written into the cache, against float64.

Shapes: R rows, Q queries of a sequence, H query heads, C KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from pageflight.kernels.attention_decode import SplitWorkspace, choose_num_splits, decode_attention
from pageflight.kernels.attention_mixed import mixed_attention
from pageflight.kernels.kv_write import rope_and_write
from perf.gpu_check.bench import BLOCK_SIZE, FP8_ERROR, Bench
from perf.gpu_check.card import Record

LEAST_SPLITS = 3
INTERPRETED_FP8_ERROR = 0.12
"""The interpreter's own conversion drops the carry of a rounded fraction."""
KEY_SCALE, VALUE_SCALE = 0.5, 0.25


class AttentionChecks:
    """Over blocks in any order, of each type of cache."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def checks(self) -> Iterator[tuple[str, Callable[[], Record]]]:
        b = self.bench
        for cache in b.caches():
            name = str(cache).removeprefix("torch.")
            full = (b.context,) * b.rows
            yield f"decode_attention {name}", partial(self.decode, f"decode_attention {name}", cache, full)
            for rows in (1, 4 if b.is_tiny else 8):
                label = f"decode_attention {name} R={rows} splits"
                lens = (b.context,) if rows == 1 else self._ragged(rows)
                yield label, partial(self.decode, label, cache, lens, least_splits=LEAST_SPLITS)
            label, length = f"mixed_attention {name}", min(b.context, b.tokens)
            yield label, partial(self.mixed, label, cache, ((0, length),))
            label += " chunks"
            yield label, partial(self.mixed, label, cache, self._chunks())
            yield f"rope_and_write {name}", partial(self.rope, f"rope_and_write {name}", cache)

    def decode(self, name: str, cache: torch.dtype, lens: tuple[int, ...], least_splits: int = 1) -> Record:
        """One query of every row, whose context is as long as `lens` says; 0 is padding."""
        b, rows, longest = self.bench, len(lens), max(lens)
        keys, values, tables = self._cache(cache, rows, longest)
        queries = b.random(rows, b.heads, b.head_dim)
        num_sms = torch.cuda.get_device_properties(b.device).multi_processor_count if b.card.is_gpu else 4
        splits = max(least_splits, choose_num_splits(rows, b.kv_heads, longest, num_sms))
        workspace = SplitWorkspace.empty(rows, b.heads, splits, b.head_dim, b.device)
        out, lens_R = torch.empty_like(queries), b.integers(*lens)

        def call() -> None:
            scale = b.head_dim**-0.5
            decode_attention(out, queries, keys, values, tables, lens_R, scale=scale, workspace=workspace)

        call()
        stored = keys.to(b.compute), values.to(b.compute)
        expected = [self._attend(queries[row : row + 1], *stored, tables[row], lens[row]) for row in range(rows)]
        record = b.judged(name, {"out": (out.clone(), torch.cat(expected))}, b.most)
        moved = 2 * sum(lens) * b.kv_heads * b.head_dim * keys.element_size()
        return {**record, **b.timed(call, moved), "rows": rows, "context": longest, "splits": splits}

    def mixed(self, name: str, cache: torch.dtype, sequences: tuple[tuple[int, int], ...]) -> Record:
        """Sequences of (tokens before, new tokens)."""
        b = self.bench
        keys, values, tables = self._cache(cache, len(sequences), max(past + count for past, count in sequences))
        counts = [count for _, count in sequences]
        queries = b.random(sum(counts), b.heads, b.head_dim)
        begins = b.integers(0, *torch.tensor(counts).cumsum(0).tolist())
        past_lens = b.integers(*(past for past, _ in sequences))
        out, longest = torch.empty_like(queries), max(counts)

        def call() -> None:
            scale = b.head_dim**-0.5
            mixed_attention(out, queries, keys, values, tables, begins, past_lens, max_query_len=longest, scale=scale)

        call()
        stored = keys.to(b.compute), values.to(b.compute)
        expected = [
            self._attend(part, *stored, table, past + len(part))
            for part, table, (past, _) in zip(torch.split(queries, counts), tables, sequences, strict=True)
        ]
        record = b.judged(name, {"out": (out.clone(), torch.cat(expected))}, b.most)
        seen = sum(count * past + count * count / 2 for past, count in sequences)  # pairs of query and key: causal
        return {**record, **b.timed(call, operations=int(4 * seen * b.heads * b.head_dim))}

    def rope(self, name: str, cache: torch.dtype) -> Record:
        """Queries turned, keys and values in their cells, all other cells as they were."""
        b, heads = self.bench, self.bench.heads + 2 * self.bench.kv_heads
        tokens = (1 if b.is_tiny else 32) * BLOCK_SIZE
        qkv = b.random(tokens, heads * b.head_dim)
        angles = torch.rand(2 * tokens, b.head_dim, device=b.device) * 6.28
        positions = b.permutation(2 * tokens)[:tokens]
        slots = b.permutation(2 * tokens)[:tokens]
        slots[1::7] = -1
        is_real = slots >= 0
        queries = torch.zeros(tokens, b.heads, b.head_dim, dtype=b.compute, device=b.device)
        shape = (2 * tokens // BLOCK_SIZE, b.kv_heads, BLOCK_SIZE, b.head_dim)
        keys, values = (torch.zeros(shape, dtype=torch.float16, device=b.device).to(cache) for _ in "kv")
        is_fp8 = cache == torch.float8_e4m3fn
        scales = (KEY_SCALE, VALUE_SCALE) if is_fp8 else (1.0, 1.0)
        cosines, sines = angles.cos(), angles.sin()

        def call() -> None:
            places = (qkv, cosines, sines, positions, slots)
            rope_and_write(queries, keys, values, *places, key_scale=scales[0], value_scale=scales[1])

        call()
        split = torch.split(qkv.double().view(tokens, heads, b.head_dim), [b.heads, b.kv_heads, b.kv_heads], 1)
        cosine, sine = (part.double()[positions.long(), None, : b.head_dim // 2] for part in (cosines, sines))
        turned = []
        for part in split[:2]:
            first, second = part.chunk(2, -1)
            turned.append(torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1))
        # Beside a cache in FP8 queries are as near as `compute` lets them be: they are judged with the other cache.
        parts = {} if is_fp8 else {"queries": (queries, turned[0] * is_real[:, None, None])}
        for kind, found, given, scale in (
            ("keys", keys, turned[1], scales[0]),
            ("values", values, split[2], scales[1]),
        ):
            cells = torch.zeros(2 * tokens, b.kv_heads, b.head_dim, dtype=torch.float64, device=b.device)
            cells[slots[is_real].long()] = given[is_real] / scale
            parts[kind] = (found.to(b.compute), cells.view(-1, BLOCK_SIZE, *cells.shape[1:]).transpose(1, 2))
        moved = 2 * qkv.numel() * qkv.element_size()
        most = b.most if not is_fp8 else FP8_ERROR if b.card.is_gpu else INTERPRETED_FP8_ERROR
        return {**b.judged(name, parts, most), **b.timed(call, moved)}

    def _ragged(self, rows: int) -> tuple[int, ...]:
        """From one key to all of the context, and one row of padding."""
        return (1, 0, *(max(2, self.bench.context * row // (rows - 1)) for row in range(2, rows)))

    def _chunks(self) -> tuple[tuple[int, int], ...]:
        """A decoding row, a prompt, and chunks behind others, in one step; none a round number of blocks."""
        most = self.bench.context
        return (most - 1, 1), (0, most // 3), (most // 2 + 3, most // 5), (BLOCK_SIZE, 3)

    def _cache(self, cache: torch.dtype, num_sequences: int, context: int) -> tuple[Tensor, Tensor, Tensor]:
        """Blocks of all sequences in random order."""
        b, columns = self.bench, -(-context // BLOCK_SIZE)
        blocks = num_sequences * columns
        keys, values = (b.random(blocks, b.kv_heads, BLOCK_SIZE, b.head_dim).to(cache) for _ in "kv")
        return keys, values, b.permutation(blocks).view(num_sequences, columns)

    def _attend(self, queries_QHD: Tensor, keys: Tensor, values: Tensor, table: Tensor, context: int) -> Tensor:
        """The last Q tokens of one sequence: float64 scores of all sequences would not fit."""
        b, count = self.bench, len(queries_QHD)
        if not context:
            return torch.zeros_like(queries_QHD, dtype=torch.float64)
        gathered = [part[table.long()].transpose(0, 1).flatten(1, 2)[:, :context].double() for part in (keys, values)]
        k, v = (part.repeat_interleave(b.heads // b.kv_heads, 0) for part in gathered)
        mask = torch.ones(count, context, dtype=torch.bool, device=b.device).tril(context - count)
        scores = queries_QHD.double().transpose(0, 1) @ k.transpose(1, 2) * b.head_dim**-0.5
        attended: Tensor = (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(0, 1)
        return attended
