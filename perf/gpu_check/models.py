"""Models with random weights, made on the device: their speed is that of trained ones of the same shape."""

from __future__ import annotations

import torch

from pageflight.lowering.device_blocks import DeviceBlocks
from pageflight.lowering.device_model import KernelModel
from pageflight.lowering.device_weight import DeviceWeight
from pageflight.models.config import DecoderConfig, RopeConfig
from pageflight.models.weights import EMBED, HEAD, expected_shapes

SHAPES = {
    "llama-3.1-8b": DecoderConfig(
        family="llama",
        vocab_size=128_256,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14_336,
        max_positions=131_072,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=500_000.0, scaling="llama3", factor=8.0),
    ),
    "tiny": DecoderConfig(
        family="llama",
        vocab_size=96,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=96,
        max_positions=512,
        rms_norm_eps=1e-5,
    ),
}
BLOCK_SIZE = 32


def random_model(
    config: DecoderConfig,
    dtype: str,
    device: torch.device,
    *,
    max_model_len: int,
    compute: torch.dtype,
    kv_dtype: str | None = None,
) -> KernelModel:
    """`dtype` bf16, fp16 or fp32 weights, or fp8 with a scale per output; activations and K/V in `compute`, or K/V in
    `kv_dtype`."""
    weights = {}
    generator = torch.Generator(device).manual_seed(7)
    for name, shape in expected_shapes(config).items():
        values = torch.empty(shape, dtype=torch.float32, device=device)
        if len(shape) == 1:
            values.fill_(1.0)
        else:
            values.normal_(0, shape[1] ** -0.5, generator=generator)
        if dtype == "fp8" and len(shape) == 2 and name not in (EMBED, HEAD):
            scales = values.abs().amax(1) / 448
            weights[name] = DeviceWeight("F8_E4M3", (values / scales[:, None]).to(torch.float8_e4m3fn), scales)
        else:
            weights[name] = DeviceWeight("wide", values.to(compute))
    kv_dtype = kv_dtype or {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[compute]
    blocks = DeviceBlocks(config, kv_dtype, BLOCK_SIZE, device)
    return KernelModel(config, weights, blocks, max_model_len=max_model_len)


def weight_bytes(config: DecoderConfig, dtype: str, element_bytes: int) -> int:
    """What a decode step reads of weights: every matrix once, but of the embedding only some rows."""
    total = 0
    for name, shape in expected_shapes(config).items():
        if len(shape) == 2 and (name != EMBED or config.tied_head):
            total += shape[0] * shape[1] * (1 if dtype == "fp8" and name not in (EMBED, HEAD) else element_bytes)
    return total
