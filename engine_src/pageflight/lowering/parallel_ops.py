"""The decoder's operations on one of several ranks: those of one device, and what ranks tell each other between them.

Shapes: T packed tokens, L rows of logits, V vocabulary, W rows of it that a rank has at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from pageflight.lowering.communicator import Communicator
from pageflight.models.ops import Ops
from pageflight.models.sharding import Split, rows_per_rank
from pageflight.models.weights import HEAD


def own_ids(ids: Tensor, vocabulary: slice) -> tuple[Tensor, Tensor]:
    """Rows of a rank's part of the embedding, 0 for ids that others have; and which those are."""
    elsewhere = (ids < vocabulary.start) | (ids >= vocabulary.stop)
    return (ids - vocabulary.start).masked_fill(elsewhere, 0), elsewhere


def all_logits(communicator: Communicator, part_LW: Tensor, vocab_size: int) -> Tensor:
    """Logits [L, V], from every rank's columns, of which all have as many."""
    return communicator.all_gather(part_LW.contiguous()).transpose(0, 1).flatten(1)[:, :vocab_size]


class ParallelOps:
    """`ops` compute with a rank's parts of the weights, in the rank's decoder; nothing of theirs is done otherwise.

    Sums go over ranks after the embedding and after the products whose inputs are cut; their bias is the first rank's.
    Logits are gathered, so every rank has all of them, the same bits.
    """

    def __init__(self, ops: Ops[Any], split: Split, communicator: Communicator) -> None:
        self._ops, self._communicator = ops, communicator
        self._is_first = split.shard.rank == 0
        self._sums, self._vocabulary = split.sums, split.vocabulary
        self._vocab_size = split.config.vocab_size
        self._most_rows = rows_per_rank(self._vocab_size, split.shard.size)

    def embed(self, ids: Tensor, weight: str) -> Tensor:
        """Rows that other ranks have count as zeros."""
        own, elsewhere = own_ids(ids, self._vocabulary)
        rows: Tensor = self._ops.embed(own, weight)
        return self._communicator.all_reduce(rows.masked_fill(elsewhere[:, None], 0))

    def linear(self, x: Any, weight: str, bias: str | None = None) -> Tensor:
        if weight == HEAD:
            return self._gathered(self._ops.linear(x, weight, bias))
        if weight not in self._sums:
            plain: Tensor = self._ops.linear(x, weight, bias)
            return plain
        return self._communicator.all_reduce(self._ops.linear(x, weight, bias if self._is_first else None))

    def _gathered(self, part_LW: Tensor) -> Tensor:
        """Logits [L, V] of every rank's rows of the vocabulary."""
        part_LW = pad(part_LW, (0, self._most_rows - part_LW.shape[1]))
        return all_logits(self._communicator, part_LW, self._vocab_size)

    # --- what each rank does for itself

    def inputs(self) -> tuple[Any, Any, Any]:
        return self._ops.inputs()

    def take(self, x: Any, rows: Any) -> Any:
        return self._ops.take(x, rows)

    def rope_rows(self, positions: Any) -> Any:
        return self._ops.rope_rows(positions)

    def rms_norm(self, x: Any, weight: str, eps: float) -> Any:
        return self._ops.rms_norm(x, weight, eps)

    def split(self, x: Any, sizes: Sequence[int]) -> Sequence[Any]:
        return self._ops.split(x, sizes)

    def rope(self, x: Any, rows: Any, num_heads: int) -> Any:
        return self._ops.rope(x, rows, num_heads)

    def paged_attention(self, layer: int, q: Any, k: Any, v: Any) -> Any:
        return self._ops.paged_attention(layer, q, k, v)

    def gated_linear(self, x: Any, weight: str, bias: str | None = None) -> Any:
        return self._ops.gated_linear(x, weight, bias)

    def add(self, a: Any, b: Any) -> Any:
        return self._ops.add(a, b)
