"""A decoder loaded onto a GPU: its weights, its K/V blocks, and one pass over them.

Shapes as in `lowering.device_ops`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pageflight.core.errors import ConfigError
from pageflight.kernels.blocks import copy_blocks, gather_blocks, scatter_blocks, staging_shape
from pageflight.lowering.device_ops import DeviceInputs, DeviceOps
from pageflight.lowering.device_weight import DeviceWeight, load_weights
from pageflight.lowering.engine_dir import EngineDir
from pageflight.models.config import DecoderConfig
from pageflight.models.decoder import decoder
from pageflight.models.ops import Ops

COMPUTE = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.bfloat16,
    "int8": torch.bfloat16,
    "int4": torch.bfloat16,
}
KV_ELEMENTS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class DeviceModel:
    """Runs passes on `device` with tensors that are there already; nothing waits for the host."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: Mapping[str, DeviceWeight],
        *,
        kv_dtype: str,
        block_size: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        """`weights`: every one of the definition, on `device`. Raises ConfigError for a kv dtype that no kernel has."""
        if kv_dtype not in KV_ELEMENTS:
            raise ConfigError(f"kv_dtype={kv_dtype!r}: on a GPU supported are {', '.join(KV_ELEMENTS)}")
        self.config, self.device = config, device
        self.block_size, self.vocab_size = block_size, config.vocab_size
        self.element = KV_ELEMENTS[kv_dtype]
        self._ops = DeviceOps(config, weights, num_positions=max_model_len, device=device)
        self._host: Tensor | None = None  # slots of the second level

    @classmethod
    def load(cls, engine: EngineDir, device: torch.device, compute: torch.dtype | None = None) -> DeviceModel:
        """An engine onto a device. `compute`: the type of activations, by default that of the engine's dtype."""
        manifest = engine.manifest
        return cls(
            engine.config,
            load_weights(engine.weights, engine.config, compute or COMPUTE[manifest.dtype], device),
            kv_dtype=manifest.kv_dtype,
            block_size=manifest.block_size,
            max_model_len=manifest.max_model_len,
            device=device,
        )

    @property
    def kv_bytes_per_block(self) -> int:
        c = self.config
        return 2 * c.num_layers * c.num_kv_heads * self.block_size * c.head_dim * self.element.itemsize

    def allocate(self, num_blocks: int, num_host_blocks: int = 0) -> None:
        """Create the K/V blocks and the host's slots (once). Raises ConfigError when memory does not suffice."""
        assert self._ops.cache is None, "blocks are allocated once"
        c = self.config
        shape = (c.num_layers, 2, num_blocks, c.num_kv_heads, self.block_size, c.head_dim)
        try:
            self._ops.cache = torch.zeros(shape, dtype=self.element, device=self.device)
            pinned = self.device.type == "cuda" and num_host_blocks > 0
            slots = staging_shape(self._ops.cache, num_host_blocks)
            self._host = torch.zeros(slots, dtype=self.element, pin_memory=pinned)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            count = f"{num_blocks} blocks and {num_host_blocks} of the host"
            raise ConfigError(f"{count} of {self.kv_bytes_per_block} bytes: {error}") from None

    @torch.inference_mode()
    def forward(self, inputs: DeviceInputs) -> Tensor:
        """Logits [L, V] in the type of products. May be captured in a graph where `inputs` stay in place."""
        self._ops.prepare(inputs)
        ops: Ops[Any] = self._ops
        logits: Tensor = decoder(ops, self.config)
        return logits

    @torch.inference_mode()
    def pass_bytes(self, num_tokens: int, num_rows: int) -> int:
        """Most memory that a pass of so many tokens and rows of logits takes, measured; before `allocate`."""
        assert self._ops.cache is None, "it makes blocks of its own"
        if self.device.type != "cuda":
            return 0
        c = self.config

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=self.device)

        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        block = (c.num_layers, 2, 1, c.num_kv_heads, self.block_size, c.head_dim)
        self._ops.cache = torch.zeros(block, dtype=self.element, device=self.device)
        self.forward(
            DeviceInputs(
                ids_T=zeros(num_tokens),
                positions_T=zeros(num_tokens),
                slots_T=zeros(num_tokens) - 1,
                tables_SM=zeros(1, -(-num_tokens // self.block_size)),
                token_begins=torch.tensor([0, num_tokens], dtype=torch.int32, device=self.device),
                past_lens_S=zeros(1),
                max_query_len=num_tokens,
                take_L=zeros(num_rows),
            )
        )
        torch.cuda.synchronize(self.device)
        self._ops.cache = None
        return torch.cuda.max_memory_allocated(self.device) - before

    def copy_blocks(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole blocks in every layer, K and V; int32 on the device. No block is both source and target."""
        copy_blocks(self._cache, sources, targets)

    def copy_out(self, blocks: Tensor, slots: Tensor) -> None:
        """Copy whole blocks (int32 on the device) to slots of the host (int64 on the host)."""
        staging = torch.empty(staging_shape(self._cache, len(blocks)), dtype=self.element, device=self.device)
        gather_blocks(staging, self._cache, blocks)
        self._slots[slots] = staging.cpu()

    def copy_in(self, slots: Tensor, blocks: Tensor) -> None:
        """Copy whole slots of the host (int64 on the host) to blocks (int32 on the device)."""
        scatter_blocks(self._cache, self._slots[slots].to(self.device), blocks)

    @property
    def _cache(self) -> Tensor:
        assert self._ops.cache is not None, "allocate comes first"
        return self._ops.cache

    @property
    def _slots(self) -> Tensor:
        assert self._host is not None, "allocate comes first"
        return self._host

    def close(self) -> None:
        self._ops.cache = self._host = None
