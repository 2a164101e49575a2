"""CUDA graphs of decode steps: captured per number of rows when first wanted, replayed after that.

A step between two sizes runs as the larger one, filled up with padding. All graphs share one memory pool: only one of
them runs at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pageflight.runners.device_rows import StagedStep

Decode = Callable[[StagedStep, bool], Tensor]
WARM_UPS = 2
"""Runs before a capture: kernels are compiled and library handles made then, which a capture does not allow. They are
steps that had to run anyway."""


@dataclass(slots=True)
class _Captured:
    num_runs: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    results: Tensor | None = None


class Graphs:
    """Runs `decode` eagerly at first, then as a graph. Without a GPU, or if not `is_used`, always eagerly."""

    def __init__(self, decode: Decode, max_num_seqs: int, device: torch.device, *, is_used: bool) -> None:
        self._decode, self._device, self._is_used = decode, device, is_used
        self._sizes = bucket_sizes(max_num_seqs) if is_used else ()
        self._captured: dict[tuple[int, bool], _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle() if is_used else None

    def bucket_of(self, num_rows: int) -> int:
        """Rows that such a step runs with."""
        return next((size for size in self._sizes if size >= num_rows), num_rows)

    def run(self, staged: StagedStep, *, filters: bool) -> Tensor:
        """`decode` of a step whose tensors are always in the same place; its result is overwritten by the next."""
        if not self._is_used:
            return self._decode(staged, filters)
        captured = self._captured.setdefault((len(staged.rows_S), filters), _Captured())
        if captured.graph is None:
            captured.num_runs += 1
            if captured.num_runs <= WARM_UPS:
                return self._decode(staged, filters)
            self._capture(captured, staged, filters)
        assert captured.graph is not None and captured.results is not None
        captured.graph.replay()
        return captured.results

    def _capture(self, captured: _Captured, staged: StagedStep, filters: bool) -> None:
        torch.cuda.synchronize(self._device)
        captured.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured.graph, pool=self._pool):
            captured.results = self._decode(staged, filters)

    def close(self) -> None:
        self._captured.clear()


def bucket_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, then every 8 up to 64, every 16 up to 256, every 64 beyond, and the most there can be."""
    sizes = {1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(320, max_num_seqs + 1, 64), max_num_seqs}
    return tuple(sorted(size for size in sizes if size <= max_num_seqs))
