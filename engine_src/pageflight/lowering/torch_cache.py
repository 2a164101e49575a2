"""K/V blocks as torch tensors, in the form the manifest's kv dtype names.

Shapes: [layers, blocks, kv heads, block size, head_dim]; u8 adds float32 scale and zero per token and head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pageflight.models.config import DecoderConfig

_ELEMENT = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.uint8,  # bits of e4m3: torch has no indexing of it
    "u8": torch.uint8,
}
KV_DTYPES = tuple(_ELEMENT)
_LEVELS = 255
_LARGEST = 448.0  # of e4m3, whose scale is 1


class BlockCache:
    """The blocks of all layers."""

    def __init__(
        self, config: DecoderConfig, kv_dtype: str, num_blocks: int, block_size: int, num_host_blocks: int = 0
    ) -> None:
        self._quantised, self._is_fp8 = kv_dtype == "u8", kv_dtype == "fp8"
        element = _ELEMENT[kv_dtype]

        def parts(count: int) -> tuple[list[Tensor], list[Tensor]]:
            shape = (config.num_layers, count, config.num_kv_heads, block_size)
            values = [torch.zeros((*shape, config.head_dim), dtype=element) for _ in "kv"]
            return values, [torch.zeros((*shape, 2)) for _ in "kv"] if self._quantised else []

        self._values, self._ranges = parts(num_blocks)
        self._host_values, self._host_ranges = parts(num_host_blocks)

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
            elif self._is_fp8:
                new = new.float().clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
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
        elif self._is_fp8:
            blocks = blocks.view(torch.float8_e4m3fn).float()
        return blocks.transpose(1, 2).flatten(2, 3)

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole blocks in every layer."""
        for part in (*self._values, *self._ranges):
            part[:, targets] = part[:, sources]

    def copy_out(self, blocks: Tensor, slots: Tensor) -> None:
        """Copy whole blocks to the host's slots, in every layer."""
        for on_device, on_host in self._levels():
            on_host[:, slots] = on_device[:, blocks]

    def copy_in(self, slots: Tensor, blocks: Tensor) -> None:
        """Copy whole slots of the host's to blocks, in every layer."""
        for on_device, on_host in self._levels():
            on_device[:, blocks] = on_host[:, slots]

    def _levels(self) -> Iterator[tuple[Tensor, Tensor]]:
        device, host = (*self._values, *self._ranges), (*self._host_values, *self._host_ranges)
        return zip(device, host, strict=True)


def _quantise(new: Tensor) -> tuple[Tensor, Tensor]:
    """u8 codes [T, kv heads, D] and (scale, zero) [T, kv heads, 2]: value = code × scale + zero."""
    low, high = new.amin(-1, keepdim=True), new.amax(-1, keepdim=True)
    scale = (high - low).clamp_min(1e-12) / _LEVELS
    codes = torch.round((new - low) / scale).clamp(0, _LEVELS)
    return codes, torch.cat([scale, low], -1)
