"""K/V blocks as torch tensors, in the form the manifest's kv dtype names.

Shapes: [layers, blocks, kv heads, block size, head_dim]; u8 adds float32 scale and zero per token and head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pageflight.models.config import DecoderConfig

_ELEMENT = {"fp32": torch.float32, "bf16": torch.bfloat16, "u8": torch.uint8}
KV_DTYPES = tuple(_ELEMENT)
_LEVELS = 255


class BlockCache:
    """The blocks of all layers."""

    def __init__(self, config: DecoderConfig, kv_dtype: str, num_blocks: int, block_size: int) -> None:
        shape = (config.num_layers, num_blocks, config.num_kv_heads, block_size)
        self._quantised = kv_dtype == "u8"
        element = _ELEMENT[kv_dtype]
        self._values = [torch.zeros((*shape, config.head_dim), dtype=element) for _ in "kv"]
        self._ranges = [torch.zeros((*shape, 2)) for _ in "kv"] if self._quantised else []

    @staticmethod
    def bytes_per_block(config: DecoderConfig, kv_dtype: str, block_size: int) -> int:
        """K and V of all layers."""
        per_head = config.head_dim * _ELEMENT[kv_dtype].itemsize + (8 if kv_dtype == "u8" else 0)
        return 2 * config.num_layers * config.num_kv_heads * block_size * per_head

    def write(self, layer: int, place: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> None:
        """Store new keys and values [T, kv heads, D] at (block [T], offset [T])."""
        block, offset = place
        for kind, new in enumerate((k, v)):
            if self._quantised:
                new, self._ranges[kind][layer][block, :, offset] = _quantise(new.float())
            self._values[kind][layer][block, :, offset] = new.to(self._values[kind].dtype)

    def read(self, layer: int, tables_SB: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of whole block tables, [S, kv heads, B × block size, D] each."""
        keys, values = (self._gather(kind, layer, tables_SB).to(dtype) for kind in (0, 1))
        return keys, values

    def _gather(self, kind: int, layer: int, tables_SB: Tensor) -> Tensor:
        blocks = self._values[kind][layer][tables_SB]
        if self._quantised:
            ranges = self._ranges[kind][layer][tables_SB]
            blocks = blocks.float() * ranges[..., :1] + ranges[..., 1:]
        return blocks.transpose(1, 2).flatten(2, 3)

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole blocks in every layer."""
        for part in (*self._values, *self._ranges):
            part[:, targets] = part[:, sources]


def _quantise(new: Tensor) -> tuple[Tensor, Tensor]:
    """u8 codes [T, kv heads, D] and (scale, zero) [T, kv heads, 2]: value = code × scale + zero."""
    low, high = new.amin(-1, keepdim=True), new.amax(-1, keepdim=True)
    scale = (high - low).clamp_min(1e-12) / _LEVELS
    codes = torch.round((new - low) / scale).clamp(0, _LEVELS)
    return codes, torch.cat([scale, low], -1)
