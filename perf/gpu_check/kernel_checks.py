"""Every kernel against plain torch in float64, and its time against the card's ceilings.

Shapes: T tokens, R rows, H query heads, C KV heads, D head_dim, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from pageflight.kernels.activation import quantise_fp8_per_token, silu_mul
from pageflight.kernels.attention_decode import SplitWorkspace, choose_num_splits, decode_attention
from pageflight.kernels.attention_mixed import mixed_attention
from pageflight.kernels.gemm_fp8 import gemm_fp8, scaled_mm
from pageflight.kernels.gemm_int import gemm_int4, gemm_int8, pack_int4
from pageflight.kernels.norm import add_rms_norm
from perf.gpu_check.card import Card, Record, attempted, failure

BLOCK_SIZE = 32


class Checks:
    """Kernels at the sizes of a model; `compute` is the type of activations."""

    def __init__(self, card: Card, *, is_tiny: bool) -> None:
        self.card, self.device = card, card.device
        self.compute = torch.bfloat16 if card.is_gpu else torch.float32
        self.hidden, self.inner = (64, 96) if is_tiny else (4096, 14_336)
        self.heads, self.kv_heads, self.head_dim = (4, 2, 16) if is_tiny else (32, 8, 128)
        self.rows, self.context = (2, 40) if is_tiny else (64, 2048)
        self.tokens = 8 if is_tiny else 2048
        self.most = 2e-2 if card.is_gpu else 1e-3  # relative error that rounding to `compute` may leave
        torch.manual_seed(1)
        self.bandwidth: float | None = None
        self.rates: dict[torch.dtype, float] = {}

    def run(self) -> Iterator[Record]:
        """One record after another; a kernel that is wrong, or does not run, has `failed` in its own."""
        for name, check in self.checks():
            yield attempted(name, check)

    def checks(self) -> Iterator[tuple[str, Callable[[], Record]]]:
        """The card's ceilings first: all that is timed is compared with them."""
        has_fp8 = self.card.capability >= 89
        yield "copy", self.copy_ceiling
        yield "product bf16", partial(self.product_ceiling, torch.bfloat16)
        if self.card.is_gpu and has_fp8:
            yield "product fp8", partial(self.product_ceiling, torch.float8_e4m3fn)
        yield "add_rms_norm", self.norm
        yield "silu_mul", self.activation
        for cache in (self.compute, *((torch.float8_e4m3fn,) if has_fp8 else ())):
            yield f"decode_attention {cache}", partial(self.decode, cache)
        yield "mixed_attention", self.prefill
        for tokens in (1, 32, self.tokens):
            yield f"gemm_fp8 T={tokens}", partial(self.fp8, tokens, ours=True)
            yield f"scaled_mm T={tokens}", partial(self.fp8, tokens, ours=False)
            yield f"gemm_int8 T={tokens}", partial(self.int8, tokens)
            yield f"gemm_int4 T={tokens}", partial(self.int4, tokens)

    def copy_ceiling(self) -> Record:
        self.bandwidth = self.card.bandwidth()
        return {"name": "copy", "bytes_s": self.bandwidth}

    def product_ceiling(self, dtype: torch.dtype) -> Record:
        self.rates[dtype] = self.card.rate(dtype)
        return {"name": f"product {dtype}", "operations_s": self.rates[dtype]}

    def norm(self) -> Record:
        x, residual = (self._random(self.tokens, self.hidden) for _ in range(2))
        weight = self._random(self.hidden)
        total = x.double() + residual.double()
        expected = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
        found = add_rms_norm(x, residual.clone(), weight, 1e-5)
        moved = 4 * x.numel() * x.element_size()
        return self._record("add_rms_norm", found, expected, lambda: add_rms_norm(x, residual, weight, 1e-5), moved)

    def activation(self) -> Record:
        gate_up = self._random(self.tokens, 2 * self.inner)
        gate, up = gate_up.double().chunk(2, 1)
        moved = 3 * gate_up.numel() // 2 * gate_up.element_size()
        return self._record("silu_mul", silu_mul(gate_up), functional.silu(gate) * up, lambda: silu_mul(gate_up), moved)

    def decode(self, cache: torch.dtype) -> Record:
        wide_keys, wide_values, tables = self._cache(self.rows, self.context)
        keys, values = wide_keys.to(cache), wide_values.to(cache)
        queries = self._random(self.rows, self.heads, self.head_dim)
        lens = torch.full((self.rows,), self.context, dtype=torch.int32, device=self.device)
        num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count if self.card.is_gpu else 4
        splits = choose_num_splits(self.rows, self.kv_heads, self.context, num_sms)
        workspace = SplitWorkspace.empty(self.rows, self.heads, splits, self.head_dim, self.device)
        out = torch.empty_like(queries)

        def call() -> None:
            decode_attention(out, queries, keys, values, tables, lens, scale=self.head_dim**-0.5, workspace=workspace)

        call()
        stored = keys.to(self.compute), values.to(self.compute)
        expected = self._attend(queries[:, None], *stored, tables)[:, 0]
        moved = 2 * self.rows * self.context * self.kv_heads * self.head_dim * keys.element_size()
        record = self._record(f"decode_attention {keys.dtype}", out.clone(), expected, call, moved)
        return {**record, "rows": self.rows, "context": self.context, "splits": splits}

    def prefill(self) -> Record:
        length = min(self.context, self.tokens)
        keys, values, tables = self._cache(1, length)
        queries = self._random(length, self.heads, self.head_dim)
        begins = torch.tensor([0, length], dtype=torch.int32, device=self.device)
        past = torch.zeros(1, dtype=torch.int32, device=self.device)
        out = torch.empty_like(queries)

        def call() -> None:
            scale = self.head_dim**-0.5
            mixed_attention(out, queries, keys, values, tables, begins, past, max_query_len=length, scale=scale)

        call()
        expected = self._attend(queries[None], keys, values, tables)[0]
        operations = 2 * length * length * self.heads * self.head_dim  # half of two products: causal
        return self._record("mixed_attention", out.clone(), expected, call, operations=operations)

    def fp8(self, tokens: int, *, ours: bool) -> Record:
        name = f"{'gemm_fp8' if ours else 'scaled_mm'} T={tokens}"
        if self.card.capability < 89:
            return {"name": name, "skipped": "FP8 needs compute capability 8.9"}
        x, scales = quantise_fp8_per_token(self._random(tokens, self.hidden))
        wide = torch.randn(self.inner, self.hidden, device=self.device)
        weight_scales = wide.abs().amax(1) / 448
        weight = (wide / weight_scales[:, None]).to(torch.float8_e4m3fn)
        product = gemm_fp8 if ours else scaled_mm

        def call() -> Tensor:
            return product(x, weight, scales, weight_scales, out_dtype=self.compute)

        expected = (x.double() * scales[:, None]) @ (weight.double() * weight_scales[:, None]).t()
        operations = 2 * tokens * self.inner * self.hidden
        return self._record(name, call(), expected, call, weight.numel(), operations, torch.float8_e4m3fn)

    def int8(self, tokens: int) -> Record:
        x, codes = self._random(tokens, self.hidden), self._codes(127)
        scales = torch.rand(self.inner, 1, device=self.device) / 127
        expected = x.double() @ (codes.double() * scales).t()
        operations = 2 * tokens * codes.numel()
        return self._record(
            f"gemm_int8 T={tokens}",
            gemm_int8(x, codes, scales),
            expected,
            lambda: gemm_int8(x, codes, scales),
            codes.numel(),
            operations,
        )

    def int4(self, tokens: int) -> Record:
        x, codes = self._random(tokens, self.hidden), self._codes(7)
        scales = torch.rand(self.inner, self.hidden // 32, device=self.device) / 7
        packed = pack_int4(codes)
        expected = x.double() @ (codes.double().view(self.inner, -1, 32) * scales[:, :, None]).view_as(codes).t()
        operations = 2 * tokens * codes.numel()
        return self._record(
            f"gemm_int4 T={tokens}",
            gemm_int4(x, packed, scales),
            expected,
            lambda: gemm_int4(x, packed, scales),
            packed.numel() + 4 * scales.numel(),
            operations,
        )

    def _record(
        self,
        name: str,
        found: Tensor,
        expected: Tensor,
        call: Callable[[], object],
        moved: int = 0,
        operations: int = 0,
        kind: torch.dtype = torch.bfloat16,
    ) -> Record:
        """Whether the result is right, and the time as shares of the ceilings."""
        error = float((found.double() - expected).norm() / expected.norm())
        seconds = self.card.seconds(call)
        record: Record = {"name": name, "us": round(seconds * 1e6, 2), "error": error}
        record |= failure(f"relative error {error:.2e}, at most {self.most:g}", unless=error < self.most)
        if moved and self.bandwidth is not None:
            record["of_bandwidth"] = round(moved / seconds / self.bandwidth, 3)
        if operations and kind in self.rates:
            record["of_rate"] = round(operations / seconds / self.rates[kind], 3)
        return record

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.compute)

    def _codes(self, limit: int) -> Tensor:
        size = (self.inner, self.hidden)
        return torch.randint(-limit, limit + 1, size, dtype=torch.int8, device=self.device)

    def _cache(self, num_sequences: int, context: int) -> tuple[Tensor, Tensor, Tensor]:
        """Blocks of all sequences in random order."""
        columns = -(-context // BLOCK_SIZE)
        blocks = num_sequences * columns
        keys, values = (self._random(blocks, self.kv_heads, BLOCK_SIZE, self.head_dim) for _ in range(2))
        tables = torch.randperm(blocks, device=self.device).to(torch.int32).view(num_sequences, columns)
        return keys, values, tables

    def _attend(self, queries_SQHD: Tensor, keys: Tensor, values: Tensor, tables: Tensor) -> Tensor:
        """The last Q tokens of every sequence, sequence by sequence: float64 scores of all would not fit."""
        outputs = []
        num_queries = queries_SQHD.shape[1]
        context = self.context if num_queries == 1 else num_queries
        for queries, table in zip(queries_SQHD, tables, strict=True):
            gathered = [
                part[table.long()].transpose(0, 1).flatten(1, 2)[:, :context].double() for part in (keys, values)
            ]
            k, v = (part.repeat_interleave(self.heads // self.kv_heads, 0) for part in gathered)
            mask = torch.ones(num_queries, context, dtype=torch.bool, device=self.device).tril(context - num_queries)
            scores = queries.double().transpose(0, 1) @ k.transpose(1, 2) * self.head_dim**-0.5
            outputs.append((scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(0, 1))
        return torch.stack(outputs)
