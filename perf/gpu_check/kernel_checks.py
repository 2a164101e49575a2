"""Every kernel against plain torch in float64 or the host, and its time against the card's ceilings.

Shapes: T tokens, N outputs, K inputs, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from pageflight.kernels.activation import quantise_fp8_per_token, silu_mul, silu_mul_fp8
from pageflight.kernels.gemm_fp8 import gemm_fp8, scaled_mm
from pageflight.kernels.gemm_int import gemm_int4, gemm_int8, pack_int4
from pageflight.kernels.moe import mixture
from pageflight.kernels.norm import add_rms_norm, add_rms_norm_fp8, rms_norm
from perf.gpu_check.attention_checks import AttentionChecks
from perf.gpu_check.bench import FP8_ERROR, Bench
from perf.gpu_check.card import Card, Record, attempted
from perf.gpu_check.sampling_checks import sampled
from perf.gpu_check.state_checks import StateChecks

EXPERTS, EXPERTS_CHOSEN = 8, 2
EPSILON = 1e-5


class Checks:
    """All kernels: those between attention and attention here, others beside."""

    def __init__(self, card: Card, *, is_tiny: bool) -> None:
        self.bench = Bench(card, is_tiny=is_tiny)

    def run(self) -> Iterator[Record]:
        """One record after another; a kernel that is wrong, or does not run, has `failed` in its own."""
        for name, check in self.checks():
            yield attempted(name, check)

    def checks(self) -> Iterator[tuple[str, Callable[[], Record]]]:
        """The card's ceilings first: all that is timed is compared with them."""
        b = self.bench
        yield "copy", self.copy_ceiling
        yield "product bf16", partial(self.product_ceiling, torch.bfloat16)
        if b.card.is_gpu and b.has_fp8:
            yield "product fp8", partial(self.product_ceiling, torch.float8_e4m3fn)
        yield "rms_norm", self.norm
        yield "add_rms_norm", self.add_norm
        yield "silu_mul", self.activation
        if b.has_fp8:
            yield "quantise", self.quantise
        yield from AttentionChecks(b).checks()
        yield from StateChecks(b).checks()
        yield "sample", partial(sampled, b)
        for tokens in sorted({1, 32, b.tokens}):
            if b.has_fp8:
                yield f"gemm_fp8 T={tokens}", partial(self.fp8, tokens, ours=True)
                yield f"scaled_mm T={tokens}", partial(self.fp8, tokens, ours=False)
            yield f"gemm_int8 T={tokens}", partial(self.int8, tokens)
            yield f"gemm_int4 T={tokens}", partial(self.int4, tokens)
        for tokens in sorted({1, b.tokens}):
            for is_fp8 in (False, True) if b.has_fp8 else (False,):
                name = f"mixture {'fp8 ' if is_fp8 else ''}T={tokens}"
                yield name, partial(self.mixture, name, tokens, is_fp8)

    def copy_ceiling(self) -> Record:
        self.bench.bandwidth = self.bench.card.bandwidth()
        return {"name": "copy", "bytes_s": self.bench.bandwidth}

    def product_ceiling(self, dtype: torch.dtype) -> Record:
        self.bench.rates[dtype] = rate = self.bench.card.rate(dtype)
        return {"name": f"product {dtype}", "operations_s": rate}

    def norm(self) -> Record:
        b = self.bench
        x, weight = b.random(b.tokens, b.hidden), b.random(b.hidden)
        expected = _normed(x.double(), weight)
        moved = 2 * x.numel() * x.element_size()
        return self._record("rms_norm", expected, lambda: rms_norm(x, weight, EPSILON), moved)

    def add_norm(self) -> Record:
        """Adds in place."""
        b = self.bench
        x, residual = (b.random(b.tokens, b.hidden) for _ in range(2))
        weight, total = b.random(b.hidden), x.double() + residual.double()
        added = residual.clone()
        parts = {"normed": (add_rms_norm(x, added, weight, EPSILON), _normed(total, weight)), "sum": (added, total)}
        record = b.judged("add_rms_norm", parts, b.most)
        return {
            **record,
            **b.timed(lambda: add_rms_norm(x, residual, weight, EPSILON), 4 * x.numel() * x.element_size()),
        }

    def activation(self) -> Record:
        b = self.bench
        gate_up = b.random(b.tokens, 2 * b.inner)
        gate, up = gate_up.double().chunk(2, 1)
        moved = 3 * gate_up.numel() // 2 * gate_up.element_size()
        return self._record("silu_mul", functional.silu(gate) * up, lambda: silu_mul(gate_up), moved)

    def quantise(self) -> Record:
        """Activations in FP8 with a scale per token."""
        b = self.bench
        gate_up = b.random(b.tokens, 2 * b.inner)
        gate, up = gate_up.double().chunk(2, 1)
        x, residual, weight = b.random(b.tokens, b.hidden), b.random(b.tokens, b.hidden), b.random(b.hidden)
        found = {
            "x": (quantise_fp8_per_token(gate_up), gate_up.double()),
            "silu_mul": (silu_mul_fp8(gate_up), functional.silu(gate) * up),
            "norm": (
                add_rms_norm_fp8(x, residual.clone(), weight, EPSILON),
                _normed(x.double() + residual.double(), weight),
            ),
        }
        parts = {
            name: (values.double() * scales[:, None], expected) for name, ((values, scales), expected) in found.items()
        }
        moved = 3 * gate_up.numel()
        return {**b.judged("quantise", parts, FP8_ERROR), **b.timed(lambda: quantise_fp8_per_token(gate_up), moved)}

    def fp8(self, tokens: int, *, ours: bool) -> Record:
        b, name = self.bench, f"{'gemm_fp8' if ours else 'scaled_mm'} T={tokens}"
        x, scales = quantise_fp8_per_token(b.random(tokens, b.hidden))
        wide = torch.randn(b.inner, b.hidden, device=b.device)
        weight_scales = wide.abs().amax(1) / 448
        weight = (wide / weight_scales[:, None]).to(torch.float8_e4m3fn)
        product = gemm_fp8 if ours else scaled_mm

        def call() -> Tensor:
            return product(x, weight, scales, weight_scales, out_dtype=b.compute)

        expected = (x.double() * scales[:, None]) @ (weight.double() * weight_scales[:, None]).t()
        operations = 2 * tokens * b.inner * b.hidden
        return self._record(name, expected, call, weight.numel(), operations, torch.float8_e4m3fn)

    def int8(self, tokens: int) -> Record:
        b = self.bench
        x, codes = b.random(tokens, b.hidden), self._codes(127)
        scales = torch.rand(b.inner, 1, device=b.device) / 127
        expected = x.double() @ (codes.double() * scales).t()
        operations = 2 * tokens * codes.numel()
        return self._record(
            f"gemm_int8 T={tokens}",
            expected,
            lambda: gemm_int8(x, codes, scales),
            codes.numel(),
            operations,
        )

    def int4(self, tokens: int) -> Record:
        b = self.bench
        x, codes = b.random(tokens, b.hidden), self._codes(7)
        scales = torch.rand(b.inner, b.hidden // 32, device=b.device) / 7
        packed = pack_int4(codes)
        expected = x.double() @ (codes.double().view(b.inner, -1, 32) * scales[:, :, None]).view_as(codes).t()
        operations = 2 * tokens * codes.numel()
        return self._record(
            f"gemm_int4 T={tokens}",
            expected,
            lambda: gemm_int4(x, packed, scales),
            packed.numel() + 4 * scales.numel(),
            operations,
        )

    def mixture(self, name: str, tokens: int, is_fp8: bool) -> Record:
        """Router, experts and their sum; experts an eighth as wide as a layer without."""
        b, inner = self.bench, max(32, self.bench.inner // 8)
        x, logits = b.random(tokens, b.hidden), torch.randn(tokens, EXPERTS, device=b.device)
        gate_up = torch.randn(EXPERTS, 2 * inner, b.hidden, device=b.device) * b.hidden**-0.5
        down = torch.randn(EXPERTS, b.hidden, inner, device=b.device) * inner**-0.5
        scales: list[Tensor | None] = [None, None]
        stored, exact = [part.to(b.compute) for part in (gate_up, down)], []
        if is_fp8:
            scales = [part.abs().amax(2) / 448 for part in (gate_up, down)]
            pairs = zip((gate_up, down), scales, strict=True)
            stored = [(part / scale[:, :, None]).to(torch.float8_e4m3fn) for part, scale in pairs if scale is not None]
        for part, scale in zip(stored, scales, strict=True):
            exact.append(part.double() if scale is None else part.double() * scale[:, :, None])
        weights, chosen = logits.double().softmax(1).topk(EXPERTS_CHOSEN)
        weights = weights / weights.sum(1, keepdim=True)
        expected = torch.zeros(tokens, b.hidden, dtype=torch.float64, device=b.device)
        for expert in range(EXPERTS):
            share = (weights * (chosen == expert)).sum(1, keepdim=True)
            gate, up = (x.double() @ exact[0][expert].t()).chunk(2, 1)
            expected += share * ((functional.silu(gate) * up) @ exact[1][expert].t())

        def call() -> Tensor:
            (first, second), chosen = scales, EXPERTS_CHOSEN
            return mixture(x, logits, stored[0], stored[1], chosen, gate_up_scales=first, down_scales=second)

        most = 2 * FP8_ERROR if is_fp8 else b.most  # FP8: activations are rounded twice
        record = b.judged(name, {"out": (call(), expected)}, most)
        return {**record, **b.timed(call, operations=6 * tokens * EXPERTS_CHOSEN * inner * b.hidden)}

    def _record(
        self,
        name: str,
        expected: Tensor,
        call: Callable[[], Tensor],
        moved: int = 0,
        operations: int = 0,
        kind: torch.dtype = torch.bfloat16,
    ) -> Record:
        """Of a call that changes nothing: whether it is right, and its time."""
        record = self.bench.judged(name, {"out": (call(), expected)}, self.bench.most)
        return {**record, **self.bench.timed(call, moved, operations, kind)}

    def _codes(self, limit: int) -> Tensor:
        size = (self.bench.inner, self.bench.hidden)
        return torch.randint(-limit, limit + 1, size, dtype=torch.int8, device=self.bench.device)


def _normed(total: Tensor, weight: Tensor) -> Tensor:
    return total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPSILON) * weight.double()
