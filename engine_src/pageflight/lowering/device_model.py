"""A decoder loaded onto a GPU: weights, blocks, and passes over them. Two make one: by kernels, or by TensorRT.

Shapes as in `lowering.device_blocks`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pageflight.lowering.device_blocks import DeviceBlocks, DeviceInputs
from pageflight.lowering.device_ops import DeviceOps
from pageflight.lowering.device_weight import DeviceWeight, load_weights
from pageflight.lowering.engine_dir import EngineDir
from pageflight.models.config import DecoderConfig
from pageflight.models.decoder import decoder
from pageflight.models.ops import Ops
from pageflight.models.weights import EMBED

COMPUTE = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.bfloat16,
    "int8": torch.bfloat16,
    "int4": torch.bfloat16,
}


class DeviceModel(ABC):
    """Runs passes on the device of its `blocks` with tensors that are there already; nothing waits for the host."""

    def __init__(self, config: DecoderConfig, blocks: DeviceBlocks) -> None:
        self.config, self.blocks, self.device = config, blocks, blocks.device

    @property
    @abstractmethod
    def activations(self) -> torch.dtype:
        """The type of queries, and of what passes between products."""

    @abstractmethod
    def forward(self, inputs: DeviceInputs) -> Tensor:
        """Logits [L, V]. May be captured in a graph where `inputs` stay in place."""

    @torch.inference_mode()
    def pass_bytes(self, num_tokens: int, num_rows: int) -> int:
        """Most memory that a pass of so many tokens and rows of logits takes, measured; before blocks are allocated."""
        if self.device.type != "cuda":
            return 0

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=self.device)

        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.blocks.allocate(1)
        self.forward(
            DeviceInputs(
                ids_T=zeros(num_tokens),
                positions_T=zeros(num_tokens),
                slots_T=zeros(num_tokens) - 1,
                tables_SM=zeros(1, -(-num_tokens // self.blocks.block_size)),
                token_begins=torch.tensor([0, num_tokens], dtype=torch.int32, device=self.device),
                past_lens_S=zeros(1),
                max_query_len=num_tokens,
                take_L=zeros(num_rows),
            )
        )
        torch.cuda.synchronize(self.device)
        self.blocks.free()
        return torch.cuda.max_memory_allocated(self.device) - before

    def warmed_up(self) -> None:  # noqa: B027
        """What steps launch has run once; a model that keeps what it compiled for the next start does so now."""

    def close(self) -> None:
        self.blocks.free()


class KernelModel(DeviceModel):
    """The decoder on our kernels and torch's products."""

    def __init__(
        self, config: DecoderConfig, weights: Mapping[str, DeviceWeight], blocks: DeviceBlocks, *, max_model_len: int
    ) -> None:
        """`weights`: every one of the definition, on the device."""
        super().__init__(config, blocks)
        self._activations = weights[EMBED].values.dtype
        self._ops = DeviceOps(config, weights, blocks, num_positions=max_model_len)

    @property
    def activations(self) -> torch.dtype:
        return self._activations

    @classmethod
    def load(cls, engine: EngineDir, device: torch.device, compute: torch.dtype | None = None) -> KernelModel:
        """An engine onto a device. `compute`: the type of activations, by default that of the engine's dtype."""
        manifest = engine.manifest
        compute = compute or COMPUTE[manifest.dtype]
        weights = load_weights(engine.weights, engine.config, compute, device)
        # The reference computes in float32; here queries are narrower, and keys and values are rounded to their type.
        narrow = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(compute)
        kv_dtype = narrow if narrow and manifest.kv_dtype == "fp32" else manifest.kv_dtype
        blocks = DeviceBlocks(engine.config, kv_dtype, manifest.block_size, device)
        return cls(engine.config, weights, blocks, max_model_len=manifest.max_model_len)

    @torch.inference_mode()
    def forward(self, inputs: DeviceInputs) -> Tensor:
        self._ops.prepare(inputs)
        ops: Ops[Any] = self._ops
        logits: Tensor = decoder(ops, self.config)
        return logits
