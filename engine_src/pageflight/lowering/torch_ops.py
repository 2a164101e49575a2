"""The decoder's operations, computed now with torch: plain and short, the reference for every other lowering.

Shapes: T packed tokens, S sequences, B their largest block count, Q their largest chunk, C = B × block size cached
positions; D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pageflight.lowering.base import StepInputs
from pageflight.lowering.torch_cache import BlockCache
from pageflight.lowering.torch_weight import TorchWeight
from pageflight.models.config import DecoderConfig
from pageflight.models.rope import rope_tables
from pageflight.quant.store import Weights


class EagerOps:
    """Computes one step at a time: `prepare` it, then run the decoder."""

    def __init__(self, config: DecoderConfig, weights: Weights, num_positions: int, compute: torch.dtype) -> None:
        self._config, self._weights, self.compute = config, weights, compute
        self.cache: BlockCache | None = None
        self._loaded: dict[str, TorchWeight] = {}
        self._tables = tuple(torch.from_numpy(table) for table in rope_tables(config, num_positions))

    def prepare(self, inputs: StepInputs, block_size: int) -> None:
        """Index tensors of a step: where new keys go, which blocks each sequence reads, what each token may see."""
        self._inputs = tuple(torch.from_numpy(np.asarray(a)) for a in (inputs.ids_T, inputs.positions_T, inputs.take_L))
        chunk_lens = np.diff(inputs.token_begins)
        sequence_T = np.repeat(np.arange(len(chunk_lens)), chunk_lens)
        in_chunk_T = inputs.positions_T - inputs.past_lens_S[sequence_T]
        block_T = inputs.block_indices_N[inputs.block_begins[sequence_T] + inputs.positions_T // block_size]
        self._write = torch.from_numpy(block_T.astype(np.int64)), torch.from_numpy(inputs.positions_T % block_size)
        self._place = torch.from_numpy(sequence_T), torch.from_numpy(in_chunk_T)
        num_blocks = np.diff(inputs.block_begins)
        tables_SB = np.zeros((len(num_blocks), int(num_blocks.max())), np.int64)
        for row, begin, count in zip(tables_SB, inputs.block_begins, num_blocks, strict=False):
            row[:count] = inputs.block_indices_N[begin : begin + count]
        self._tables_SB = torch.from_numpy(tables_SB)
        last_seen_SQ = inputs.past_lens_S[:, None] + np.arange(int(chunk_lens.max()))[None]
        visible = np.arange(tables_SB.shape[1] * block_size)[None, None] <= last_seen_SQ[:, :, None]
        self._visible_SQC = torch.from_numpy(visible)

    # --- operations of the decoder ---

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        ids, positions, take = self._inputs
        return ids, positions, take

    def embed(self, ids: Tensor, weight: str) -> Tensor:
        table = self._load(weight)
        assert table.scales is None, "tables are stored unquantised"
        return functional.embedding(ids, table.values).to(self.compute)

    def take(self, x: Tensor, rows: Tensor) -> Tensor:
        return x[rows]

    def rope_rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cosines, sines = (table[positions][:, None].to(self.compute) for table in self._tables)
        return cosines, sines

    def rms_norm(self, x: Tensor, weight: str, eps: float) -> Tensor:
        """Computed in float32 and rounded once, as the checkpoints' own code does."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (self._load(weight).values.float() * normed).to(x.dtype)

    def linear(self, x: Tensor, weight: str, bias: str | None = None) -> Tensor:
        offset = None if bias is None else self._load(bias).values.to(x.dtype)
        return self._load(weight).product(x, offset)

    def split(self, x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
        return torch.split(x, list(sizes), 1)

    def rope(self, x: Tensor, rows: tuple[Tensor, Tensor], num_heads: int) -> Tensor:
        heads = x.reshape(len(x), num_heads, self._config.head_dim)
        first, second = heads.chunk(2, 2)
        turned: Tensor = heads * rows[0] + torch.cat([-second, first], 2) * rows[1]
        return turned.flatten(1)

    def paged_attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        c = self._config
        assert self.cache is not None, "allocate comes first"
        heads = (len(k), c.num_kv_heads, c.head_dim)
        self.cache.write(layer, self._write, k.reshape(heads), v.reshape(heads))
        keys, values = self.cache.read(layer, self._tables_SB, self.compute)  # [S, kv heads, C, D]
        num_sequences, longest = self._visible_SQC.shape[:2]
        queries = q.new_zeros(num_sequences, longest, c.num_heads, c.head_dim)
        queries[self._place] = q.reshape(len(q), c.num_heads, c.head_dim)
        attended = functional.scaled_dot_product_attention(
            queries.transpose(1, 2), keys, values, attn_mask=self._visible_SQC[:, None], enable_gqa=True
        )
        return attended.transpose(1, 2)[self._place].flatten(1)

    def gated_linear(self, x: Tensor, weight: str, bias: str | None = None) -> Tensor:
        gate, up = self.linear(x, weight, bias).chunk(2, 1)
        return functional.silu(gate) * up

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def _load(self, name: str) -> TorchWeight:
        if name not in self._loaded:
            self._loaded[name] = TorchWeight.of(self._weights[name])
        return self._loaded[name]
