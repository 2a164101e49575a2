"""What the dense kernels must compute, in plain torch. Shapes: T tokens, H or K inputs, N outputs, I intermediate."""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """float32 [T, H], not rounded yet."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * weight.float()


def silu_mul(gate_up: Tensor) -> Tensor:
    """float32 [T, I] of [T, 2I], not rounded yet."""
    gate, up = gate_up.float().chunk(2, 1)
    return torch.nn.functional.silu(gate) * up


def to_fp8(values: Tensor, scale: Tensor | float) -> Tensor:
    """float32 values in FP8, saturated."""
    return (values / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def token_scales(values: Tensor) -> Tensor:
    """float32 [T] of [T, H]; 1 for rows of zeros."""
    scales = values.float().abs().amax(1) / FP8_MAX
    return torch.where(scales < 2.0**-126, torch.ones_like(scales), scales)


def fp8_product(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """float32 [T, N], summed in float64."""
    sums = x.double() @ weight.double().T
    return (sums * x_scale.double().reshape(-1, 1) * weight_scale.double().reshape(1, -1)).float()


def mixture(x: Tensor, router_logits: Tensor, gate_up: Tensor, down: Tensor, top_k: int) -> Tensor:
    """float32 [T, H] of weights [E, 2I, H] and [E, H, I], token by token; not rounded on the way."""
    weights, experts = router_logits.float().softmax(1).topk(top_k)
    weights = weights / weights.sum(1, keepdim=True)
    rows = []
    for row, row_weights, row_experts in zip(x.float(), weights, experts.tolist(), strict=True):
        hidden = [silu_mul((gate_up[expert].float() @ row)[None])[0] for expert in row_experts]
        results = [down[expert].float() @ h for expert, h in zip(row_experts, hidden, strict=True)]
        rows.append((torch.stack(results) * row_weights[:, None]).sum(0))
    return torch.stack(rows)


def fp8_steps_apart(found: Tensor, expected: Tensor) -> int:
    """By how many FP8 numbers two tensors differ at most: 1 where float32 values beside a tie were rounded apart."""

    def rank(values: Tensor) -> Tensor:
        bits = values.view(torch.uint8).to(torch.int32)
        return torch.where(bits < 128, bits, 128 - bits)

    return int((rank(found) - rank(expected)).abs().max()) if found.numel() else 0


def random_rows(num_rows: int, size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
