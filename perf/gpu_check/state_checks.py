"""What moves integers and whole blocks, bit by bit against plain indexing.

Shapes: R rows, P most tokens of a row, B most blocks of a row, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from pageflight.kernels.blocks import copy_blocks, gather_blocks, scatter_blocks, staging_shape
from pageflight.kernels.step_inputs import append, fill, prepare, scatter
from perf.gpu_check.bench import BLOCK_SIZE, Bench
from perf.gpu_check.card import Record

PADDING = -1


class StateChecks:
    """Rows as the runner keeps them, and copies of blocks."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.rows, self.length = (5, 2 * BLOCK_SIZE) if bench.is_tiny else (256, 64 * BLOCK_SIZE)
        self.columns = self.length // BLOCK_SIZE

    def checks(self) -> Iterator[tuple[str, Callable[[], Record]]]:
        for cache in self.bench.caches():
            name = f"copies of blocks {cache}".replace("torch.", "")
            yield name, partial(self.copies, name, cache)
        yield "changes of rows", self.changes
        for is_decode in (True, False):
            name = f"inputs of a {'decode' if is_decode else 'mixed'} step"
            yield name, partial(self.inputs, name, is_decode)
        yield "ids put back", self.appended

    def copies(self, name: str, cache_type: torch.dtype) -> Record:
        """Blocks to others, to a staging buffer and back; -1 is padding."""
        b, count = self.bench, 16
        shape = (2, 2, 3 * count, b.kv_heads, BLOCK_SIZE, b.head_dim)
        cache = torch.randn(shape, device=b.device).to(cache_type)
        ids = b.permutation(3 * count)
        sources, targets = ids[:count].clone(), ids[count : 2 * count].clone()
        sources[3], targets[5] = PADDING, PADDING
        real = (sources >= 0) & (targets >= 0)
        expected = _bits(cache).clone()
        expected[:, :, targets[real].long()] = expected[:, :, sources[real].long()]
        copy_blocks(cache, sources, targets)
        parts = {"copied": (_bits(cache).clone(), expected)}
        staging = torch.zeros(staging_shape(cache, count), device=b.device).to(cache_type)
        gather_blocks(staging, cache, sources)
        gathered = torch.zeros_like(_bits(staging))
        there = sources >= 0
        gathered[there] = expected[:, :, sources[there].long()].permute(2, 0, 1, 3, 4, 5)
        parts["gathered"] = (_bits(staging).clone(), gathered)
        expected = expected.clone()
        expected[:, :, targets[targets >= 0].long()] = gathered[targets >= 0].permute(1, 2, 0, 3, 4, 5)
        scatter_blocks(cache, staging, targets)
        parts["scattered"] = (_bits(cache), expected)
        moved = 2 * int(real.sum()) * (cache.numel() // (3 * count)) * cache.element_size()
        return {**b.judged(name, parts), **b.timed(lambda: copy_blocks(cache, sources, targets), moved)}

    def changes(self) -> Record:
        """Single words, and runs of them."""
        b, (state, _) = self.bench, self._rows()
        words = b.permutation(len(state))[: len(state) // 3].contiguous()
        values = torch.randint(0, 1000, words.shape, dtype=torch.int32, device=b.device)
        expected = state.clone()
        expected[words.long()] = values
        scatter(state, words, values)
        parts = {"words": (state.clone(), expected.clone())}
        lengths = [1, self.length, 0, self.length // 3]
        begins = b.integers(*(row * self.length for row in range(4)))
        offsets = b.integers(0, *torch.tensor(lengths).cumsum(0).tolist())
        runs = torch.randint(0, 1000, (sum(lengths),), dtype=torch.int32, device=b.device)
        for begin, run in zip(begins.tolist(), torch.split(runs, lengths), strict=True):
            expected[begin : begin + len(run)] = run
        fill(state, begins, offsets, runs, max(lengths))
        parts["runs"] = (state, expected)
        return b.judged("changes of rows", parts)

    def inputs(self, name: str, is_decode: bool) -> Record:
        """Ids, positions, slots and lengths of rows in any order with padding among them."""
        b, (state, num_tokens) = self.bench, self._rows()
        rows = b.permutation(self.rows)
        rows[1] = PADDING
        counts = torch.ones_like(rows) if is_decode else 1 + rows.abs() % 3
        starts = (7 * rows.abs() + 5) % (self.length - 3)
        sequences = torch.repeat_interleave(torch.arange(self.rows, device=b.device), counts.long())
        begins = torch.cat([b.integers(0), counts.cumsum(0).to(torch.int32)])
        total = len(sequences)
        ids, positions, slots, lens = (torch.full((total,), 77, dtype=torch.int32, device=b.device) for _ in range(4))
        chunked = {} if is_decode else {"token_begins": begins, "sequences_T": sequences.to(torch.int32)}

        def call() -> None:
            prepare(
                state,
                num_tokens,
                rows,
                starts,
                ids_T=ids,
                positions_T=positions,
                slots_T=slots,
                lens_S=lens if is_decode else None,
                stride_tokens=self.length,
                tables_at=self.rows * self.length,
                stride_tables=self.columns,
                block_size=BLOCK_SIZE,
                **chunked,
            )

        expected_tokens = num_tokens.clone()
        call()
        row, place = rows[sequences].long(), torch.arange(total, device=b.device) - begins[sequences]
        real = row >= 0
        position = torch.where(real, starts[sequences] + place, 0).long()
        tokens = state[: self.rows * self.length].view(self.rows, self.length)
        tables = state[self.rows * self.length :].view(self.rows, self.columns)
        block = tables[row.clamp_min(0), position // BLOCK_SIZE]
        expected_tokens[rows[rows >= 0].long()] = (starts + counts)[rows >= 0].to(torch.int32)
        parts = {
            "ids": (ids, torch.where(real, tokens[row.clamp_min(0), position], 0)),
            "positions": (positions[real], position[real]),  # nobody reads those of padding
            "slots": (slots, torch.where(real, block * BLOCK_SIZE + position % BLOCK_SIZE, PADDING)),
            "tokens of rows": (num_tokens, expected_tokens),
        }
        if is_decode:
            parts["lens"] = (lens, torch.where(real, position + 1, 0))
        return {**b.judged(name, parts), **b.timed(call)}

    def appended(self) -> Record:
        """Sampled ids become tokens of their rows where there is room."""
        b, (state, num_tokens) = self.bench, self._rows()
        rows = b.permutation(self.rows)
        rows[1] = PADDING
        num_tokens[rows[0].long()] = self.length  # full
        ids, log_probs = b.permutation(self.rows), torch.randn(self.rows, device=b.device)
        are_bad = ids % 3 == 0
        results = torch.zeros(3, self.rows, dtype=torch.int32, device=b.device)
        expected = state.clone()
        for line, row in enumerate(rows.tolist()):
            if row >= 0 and (at := int(num_tokens[row])) < self.length:
                expected[row * self.length + at] = ids[line]

        def call() -> None:
            append(state, num_tokens, rows, ids, log_probs, are_bad, results, stride_tokens=self.length)

        call()
        wanted = torch.stack([ids, log_probs.view(torch.int32), are_bad.to(torch.int32)])
        record = b.judged("ids put back", {"state": (state.clone(), expected), "results": (results.clone(), wanted)})
        return {**record, **b.timed(call)}

    def _rows(self) -> tuple[Tensor, Tensor]:
        """(tokens, then tables, of all rows; how many tokens each has)."""
        size = self.rows * (self.length + self.columns)
        state = torch.randint(0, 50_000, (size,), dtype=torch.int32, device=self.bench.device)
        return state, torch.randint(1, self.length, (self.rows,), dtype=torch.int32, device=self.bench.device)


def _bits(values: Tensor) -> Tensor:
    """As integers: what is copied may be no number."""
    return values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.element_size()])
