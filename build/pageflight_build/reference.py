"""The decoder in plain numpy, straight from the checkpoint: what an engine's logits are compared with after a build.

Dense causal attention over one sequence, float32, a weight at a time. It shares the definition in `models` with the
lowerings and nothing else: not their weights file, not their blocks, not their arithmetic.

Shapes: T tokens, H heads, G K/V heads, D features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pageflight.models.bits import to_float32
from pageflight.models.checkpoint import Checkpoint
from pageflight.models.config import DecoderConfig
from pageflight.models.decoder import decoder
from pageflight.models.rope import rope_tables
from pageflight.models.weights import EMBED, HEAD

Array = NDArray[Any]


def reference_logits(checkpoint: Checkpoint, config: DecoderConfig, ids_T: Sequence[int]) -> NDArray[np.float32]:
    """Logits [T, vocabulary] of one sequence, from the weights as the checkpoint stores them."""
    logits: NDArray[np.float32] = decoder(_NumpyOps(checkpoint, config, np.asarray(ids_T)), config)
    return logits


class _NumpyOps:
    def __init__(self, checkpoint: Checkpoint, config: DecoderConfig, ids_T: Array) -> None:
        self._checkpoint, self._config, self._ids_T = checkpoint, config, ids_T
        self._specs = {spec.name: spec for spec in checkpoint.specs(config)}
        self._tables = rope_tables(config, len(ids_T))

    def _weight(self, name: str) -> NDArray[np.float32]:
        spec = self._specs[EMBED if name == HEAD and HEAD not in self._specs else name]
        parts = [
            to_float32(self._checkpoint.array(source.name), self._checkpoint.record(source.name).dtype)
            for source in spec.sources
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def inputs(self) -> tuple[Array, Array, Array]:
        positions_T = np.arange(len(self._ids_T))
        return self._ids_T, positions_T, positions_T

    def embed(self, ids: Array, weight: str) -> Array:
        source = self._specs[weight].sources[0].name  # rows first: the table may be most of the model
        rows = np.ascontiguousarray(self._checkpoint.array(source)[ids])
        return to_float32(rows, self._checkpoint.record(source).dtype)

    def take(self, x: Array, rows: Array) -> Array:
        taken: Array = x[rows]
        return taken

    def rope_rows(self, positions: Array) -> tuple[Array, Array]:
        cosines, sines = self._tables
        return cosines[positions, None, :], sines[positions, None, :]

    def rms_norm(self, x: Array, weight: str, eps: float) -> Array:
        mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
        normed: Array = x / np.sqrt(mean_square + np.float32(eps)) * self._weight(weight)
        return normed

    def linear(self, x: Array, weight: str, bias: str | None = None) -> Array:
        y: Array = x @ self._weight(weight).T
        return y if bias is None else y + self._weight(bias)

    def split(self, x: Array, sizes: Sequence[int]) -> Sequence[Array]:
        return np.split(x, np.cumsum(sizes)[:-1], axis=-1)

    def rope(self, x: Array, rows: tuple[Array, Array], num_heads: int) -> Array:
        heads = x.reshape(len(x), num_heads, self._config.head_dim)
        first, second = np.split(heads, 2, axis=-1)
        rotated: Array = heads * rows[0] + np.concatenate([-second, first], axis=-1) * rows[1]
        return rotated.reshape(len(x), -1)

    def paged_attention(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        c, length = self._config, len(q)
        q_THD = q.reshape(length, c.num_heads, c.head_dim)
        k_THD, v_THD = (
            np.repeat(x.reshape(length, c.num_kv_heads, c.head_dim), c.num_heads // c.num_kv_heads, axis=1)
            for x in (k, v)
        )
        scores_HTT = np.einsum("qhd,khd->hqk", q_THD, k_THD) / np.float32(np.sqrt(c.head_dim))
        scores_HTT[:, ~np.tri(length, dtype=bool)] = -np.inf
        weights_HTT = np.exp(scores_HTT - scores_HTT.max(axis=-1, keepdims=True))
        weights_HTT /= weights_HTT.sum(axis=-1, keepdims=True)
        attended: Array = np.einsum("hqk,khd->qhd", weights_HTT, v_THD).reshape(length, -1)
        return attended

    def gated_linear(self, x: Array, weight: str, bias: str | None = None) -> Array:
        gate, up = np.split(self.linear(x, weight, bias), 2, axis=-1)
        gated: Array = gate / (1 + np.exp(-np.clip(gate, -80, None))) * up
        return gated

    def add(self, a: Array, b: Array) -> Array:
        total: Array = a + b
        return total
