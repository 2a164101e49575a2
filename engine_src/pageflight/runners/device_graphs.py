"""CUDA graphs of decode steps: captured per number of rows when first wanted, replayed after that.

A step between two sizes runs as the larger one, filled up with padding. All graphs share one memory pool: only one of
them runs at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pageflight.lowering.device_blocks import first_line, is_shortage
from pageflight.runners.device_rows import StagedStep

log = logging.getLogger(__name__)

Decode = Callable[[StagedStep, bool, bool], Tensor]
RUNS_BEFORE = 2
"""Eager runs of a size before it is captured: they compile kernels and make library handles, which no capture may."""
PATIENCE = 256
"""So many times as many after every release: what memory was taken from is not to be lacking again at once."""


@dataclass(slots=True)
class _Captured:
    num_runs: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    results: Tensor | None = None


class Graphs:
    """Runs `decode` eagerly at first, then as a graph. Without a GPU, or if not `is_used`, always eagerly."""

    def __init__(
        self,
        decode: Decode,
        max_num_seqs: int,
        device: torch.device,
        *,
        is_used: bool,
        is_capturable: Callable[[int], bool] = lambda stream: True,
    ) -> None:
        """`is_capturable`: whether what `decode` has run so far can be captured, given the CUDA handle of a stream."""
        self._decode, self._device, self._is_capturable = decode, device, is_capturable
        self._is_used = is_used and device.type == "cuda"
        self._sizes = bucket_sizes(max_num_seqs) if device.type == "cuda" else ()
        self._captured: dict[tuple[int, bool, bool], _Captured] = {}
        self._runs_before, self._can_capture = RUNS_BEFORE, True
        self._max_num_seqs = max_num_seqs
        self._pool = torch.cuda.graph_pool_handle() if self._is_used else None

    @property
    def sizes(self) -> tuple[int, ...]:
        """All buckets, ascending; none without a GPU, where steps run with the rows that they have."""
        return self._sizes

    def bucket_of(self, num_rows: int) -> int:
        """Rows that such a step runs with."""
        assert num_rows <= self._max_num_seqs, f"a step of {num_rows} rows of {self._max_num_seqs}"
        return next((size for size in self._sizes if size >= num_rows), num_rows)

    def run(self, staged: StagedStep, filters: bool, adjusts: bool) -> Tensor:
        """`decode` of a step whose tensors are always in the same place; its result is overwritten by the next."""
        if not self._is_used:
            return self._decode(staged, filters, adjusts)
        captured = self._captured.setdefault((len(staged.rows_S), filters, adjusts), _Captured())
        if captured.graph is not None and captured.results is not None:
            captured.graph.replay()
            return captured.results
        results = self._decode(staged, filters, adjusts)
        captured.num_runs += 1
        if captured.num_runs == self._runs_before and self._can_capture:
            self._capture(captured, staged, filters, adjusts)
        return results

    def release(self) -> None:
        """Give back the memory of all graphs, none of which may be running. Sizes are captured again, but later."""
        self._captured.clear()
        self._runs_before *= PATIENCE
        self._leave_pool()

    def _capture(self, captured: _Captured, staged: StagedStep, filters: bool, adjusts: bool) -> None:
        """Record the step that has just run. Where that fails, steps of this size go on without a graph."""
        torch.cuda.synchronize(self._device)
        graph, steps = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            if not self._is_capturable(steps.cuda_stream):
                raise RuntimeError("the model's steps cannot be captured")
            with torch.cuda.graph(graph, pool=self._pool):
                captured.results = self._decode(staged, filters, adjusts)
            captured.graph = graph
        except RuntimeError as error:
            captured.results = None
            self._give_up(len(staged.rows_S), error)
        finally:
            torch.cuda.set_stream(steps)  # where a capture fails, torch leaves its stream as the current one

    def _give_up(self, num_rows: int, error: RuntimeError) -> None:
        """After a failure that is no want of memory none is tried again: torch may think that it still records."""
        self._can_capture = is_shortage(error)
        others = "" if self._can_capture else ", nor of any size from now on"
        log.warning("no graph of %d rows%s: %s", num_rows, others, first_line(error))
        if all(captured.graph is None for captured in self._captured.values()):
            self._leave_pool()

    def _leave_pool(self) -> None:
        """No graph lives: torch refuses a pool that none uses and where something lies, as cuBLAS's workspace does."""
        if self._pool is not None:
            self._pool = torch.cuda.graph_pool_handle()

    def close(self) -> None:
        self._captured.clear()


def bucket_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, then every 8 up to 64, every 16 up to 256, every 64 beyond, and the most there can be."""
    sizes = {1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(320, max_num_seqs + 1, 64), max_num_seqs}
    return tuple(sorted(size for size in sizes if size <= max_num_seqs))
