"""How long a call takes on the GPU when no host launches it and nothing of it is in the cache: as a served step does.

Calls are captured in a graph, each behind a read of more than the cache of level 2 holds; a graph of these reads alone
is subtracted. Events around calls that Python launches would time Python: a kernel is often the shorter of both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import lru_cache

import torch

CALLS = 10  # in a graph
MOST_ROUNDS, LEAST_ROUNDS = 30, 5
ENOUGH_S = 0.05
"""A measurement takes about as long, if that is no less than its rounds take."""
_LEAST_S = 1e-7


def microseconds(call: Callable[[], object]) -> float:
    """Of a call that has run before, on the current GPU; every argument, weights too, comes from memory."""
    return 1e6 * cold_seconds(call, torch.device("cuda", torch.cuda.current_device()))


def cold_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median over graphs of several calls, the cache of level 2 full of something else before each."""
    flush = flusher(device)

    def both() -> None:
        flush()
        call()

    return max(graph_seconds(both, device) - _flush_seconds(device), _LEAST_S)


def graph_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median time of a call in a graph of several, without anything between them."""
    stream = torch.cuda.current_stream(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                call()
    finally:
        torch.cuda.set_stream(stream)  # torch leaves its own current where a capture fails
    _replay_seconds(graph)  # the first brings the graph to the card
    rounds = min(MOST_ROUNDS, max(LEAST_ROUNDS, int(ENOUGH_S / _replay_seconds(graph))))
    return statistics.median(_replay_seconds(graph) for _ in range(rounds)) / CALLS


@lru_cache
def flusher(device: torch.device) -> Callable[[], None]:
    """A call that reads more than the cache holds. Written lines would have to leave it in the time of the next call.

    Its result goes to the same place every time.
    """
    num_bytes = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    filler, total = torch.zeros(num_bytes // 4, device=device), torch.empty((), device=device)

    def flush() -> None:
        torch.sum(filler, dim=0, out=total)

    flush()  # loads its kernel, which no capture may
    return flush


@lru_cache
def _flush_seconds(device: torch.device) -> float:
    return graph_seconds(flusher(device), device)


def _replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
