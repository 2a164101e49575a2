"""K/V blocks on the device and their second level on the host, and attention over them.

Shapes: T packed tokens, S sequences, M columns of the block table, D head_dim, F features of a fused q, k and v; the
cache is [layers, 2, num_blocks, kv heads, block size, D].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pageflight.core.errors import ConfigError, OutOfMemory
from pageflight.kernels.attention_decode import SplitWorkspace, decode_attention
from pageflight.kernels.attention_mixed import mixed_attention
from pageflight.kernels.attention_tile import NO_WINDOW
from pageflight.kernels.blocks import copy_blocks, gather_blocks, scatter_blocks, staging_shape
from pageflight.kernels.kv_write import rope_and_write
from pageflight.kernels.tuning import AttentionTiles
from pageflight.models.config import DecoderConfig

COPIED_AT_ONCE = 32
"""Blocks that are copied to the host or back together: their staging buffer takes memory that nobody reserved."""
LONG_CONTEXT = 512
"""Keys of a row that decodes beside chunks, from which on its context is split: one program would read all of it."""
KV_ELEMENTS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,  # scale 1: what is beyond 448 is 448
}
_SHORTAGES = ("out of memory", "ALLOC_FAILED")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceInputs:
    """One forward pass, all tensors int32 on the device but for `hidden_TH`.

    A pass with `lens_S` decodes: one token a row, `lens_S` keys that it sees, its own included (0: padding). A pass
    with `token_begins` [S + 1] and `past_lens_S` may have chunks of at most `max_query_len` tokens. `take_L` picks the
    tokens whose logits are wanted; None takes all. `long_lens_S`: in a pass with chunks, the keys of rows of one
    token that see more than `LONG_CONTEXT`, 0 for all others; `workspace` splits their contexts.
    """

    ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor  # -1: padding
    tables_SM: Tensor
    lens_S: Tensor | None = None
    token_begins: Tensor | None = None
    past_lens_S: Tensor | None = None
    max_query_len: int = 1
    take_L: Tensor | None = None
    long_lens_S: Tensor | None = None
    workspace: SplitWorkspace | None = None
    tiles: AttentionTiles | None = None  # of decoding; None: unmeasured
    hidden_TH: Tensor | None = None  # of the stage before, in the type of activations; it may be overwritten


class DeviceBlocks:
    """The blocks of all layers."""

    def __init__(self, config: DecoderConfig, kv_dtype: str, block_size: int, device: torch.device) -> None:
        """Raises ConfigError for a kv dtype that no kernel has."""
        if kv_dtype not in KV_ELEMENTS:
            raise ConfigError(f"kv_dtype={kv_dtype!r}: on a GPU supported are {', '.join(KV_ELEMENTS)}")
        if kv_dtype == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            raise ConfigError(f"kv_dtype='fp8': {torch.cuda.get_device_name(device)} lacks compute capability 8.9")
        self.config, self.element, self.block_size, self.device = config, KV_ELEMENTS[kv_dtype], block_size, device
        self.cache: Tensor | None = None
        self._host: Tensor | None = None
        self._scale = config.head_dim**-0.5

    @property
    def bytes_per_block(self) -> int:
        """K and V of all layers."""
        c = self.config
        return 2 * c.num_layers * c.num_kv_heads * self.block_size * c.head_dim * self.element.itemsize

    def allocate(self, num_blocks: int, num_host_blocks: int = 0) -> None:
        """Create the blocks and the host's slots (once).

        Raises OutOfMemory where the device has not the memory, ConfigError where the host has not.
        """
        assert self.cache is None, "blocks are allocated once"
        c = self.config
        shape = (c.num_layers, 2, num_blocks, c.num_kv_heads, self.block_size, c.head_dim)
        try:
            self.cache = torch.zeros(shape, dtype=self.element, device=self.device)
        except RuntimeError as error:
            message = f"{num_blocks} blocks of {self.bytes_per_block} bytes: {first_line(error)}"
            raise (OutOfMemory if is_shortage(error) else ConfigError)(message) from None
        try:
            # Not pinned: torch would pin the next power of two, and slots are copied through a staging buffer anyway.
            # As words: torch has no indexing of FP8 on the host.
            slots = staging_shape(self.cache, num_host_blocks)
            self._host = torch.zeros(slots, dtype=self.element).view(torch.int32)
        except RuntimeError as error:
            message = f"{num_host_blocks} blocks of the host of {self.bytes_per_block} bytes: {first_line(error)}"
            raise ConfigError(message) from None

    def free(self) -> None:
        self.cache = self._host = None

    def attend(self, layer: int, qkv_TF: Tensor, cosines_PD: Tensor, sines_PD: Tensor, inputs: DeviceInputs) -> Tensor:
        """Turn q and k by their positions, write k and v into the blocks, and attend: [T, query features].

        q is turned in place.
        """
        c = self.config
        assert self.cache is not None, "allocate comes first"
        keys, values = self.cache[layer]
        heads = (len(qkv_TF), c.num_heads, c.head_dim)
        queries = qkv_TF[:, : c.q_size].view(heads)
        rope_and_write(queries, keys, values, qkv_TF, cosines_PD, sines_PD, inputs.positions_T, inputs.slots_T)
        attended = qkv_TF.new_empty(heads)
        if inputs.lens_S is not None:
            decode_attention(
                attended,
                queries,
                keys,
                values,
                inputs.tables_SM,
                inputs.lens_S,
                scale=self._scale,
                workspace=inputs.workspace,
                tiles=inputs.tiles,
            )
        else:
            assert inputs.token_begins is not None and inputs.past_lens_S is not None
            mixed_attention(
                attended,
                queries,
                keys,
                values,
                inputs.tables_SM,
                inputs.token_begins,
                inputs.past_lens_S,
                max_query_len=inputs.max_query_len,
                scale=self._scale,
                most_keys=NO_WINDOW if inputs.long_lens_S is None else LONG_CONTEXT,
            )
            if inputs.long_lens_S is not None:
                decode_attention(
                    attended,
                    queries,
                    keys,
                    values,
                    inputs.tables_SM,
                    inputs.long_lens_S,
                    scale=self._scale,
                    workspace=inputs.workspace,
                    tiles=inputs.tiles,
                    tokens_R=inputs.token_begins[:-1],
                )
        return attended.flatten(1)

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole blocks in every layer, K and V; int32 on the device. No block is both source and target."""
        copy_blocks(self._cache, sources, targets)

    def copy_out(self, blocks: Tensor, slots: Tensor) -> None:
        """Copy whole blocks (int32 on the device) to slots of the host (int64 on the host)."""
        for begin in range(0, len(blocks), COPIED_AT_ONCE):
            part = slice(begin, begin + COPIED_AT_ONCE)
            shape = staging_shape(self._cache, len(blocks[part]))
            staging = torch.empty(shape, dtype=self.element, device=self.device)
            gather_blocks(staging, self._cache, blocks[part])
            self._slots[slots[part]] = staging.cpu().view(torch.int32)

    def copy_in(self, slots: Tensor, blocks: Tensor) -> None:
        """Copy whole slots of the host (int64 on the host) to blocks (int32 on the device)."""
        for begin in range(0, len(blocks), COPIED_AT_ONCE):
            part = slice(begin, begin + COPIED_AT_ONCE)
            staging = self._slots[slots[part]].view(self.element).to(self.device)
            scatter_blocks(self._cache, staging, blocks[part])

    @property
    def _cache(self) -> Tensor:
        assert self.cache is not None, "allocate comes first"
        return self.cache

    @property
    def _slots(self) -> Tensor:
        assert self._host is not None, "allocate comes first"
        return self._host


def is_shortage(error: RuntimeError) -> bool:
    """Whether a device had not the memory: libraries and drivers say it in words of their own."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _SHORTAGES)


def first_line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0]
