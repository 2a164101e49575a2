"""The card at hand: what it is, what it can do at most, and how long a call takes on it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton

Record = dict[str, object]
"""What a check found; `failed` in it says what is wrong, `skipped` why nothing was checked."""
CALLS = 10  # in a graph


def failure(complaint: str, *, unless: bool) -> Record:
    """What a record is extended by: nothing where all is right."""
    return {} if unless else {"failed": complaint}


def attempted(name: str, check: Callable[[], Record]) -> Record:
    """The record of a check. One that raises has failed: the next may still say something."""
    try:
        return check()
    except Exception as error:
        return {"name": name, "failed": f"{type(error).__name__}: {error}"}


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU; or the CPU, on which everything runs in Triton's interpreter and no time means anything."""

    device: torch.device

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def capability(self) -> int:
        """Compute capability times ten; that of an H200 for the CPU, which interprets everything."""
        if not self.is_gpu:
            return 90
        major, minor = torch.cuda.get_device_capability(self.device)
        return 10 * major + minor

    def facts(self) -> Record:
        """What figures must be read with."""
        versions: Record = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
        if not self.is_gpu:
            return {"gpu": "none (interpreted)", **versions}
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            **versions,
        }

    def seconds(self, call: Callable[[], object], *, rounds: int = 30, warm_up: int = 5) -> float:
        """Median time of a call on the GPU, by events, of several in one graph: the host launches none of them.

        Calls that read little find it in the cache.
        """
        if not self.is_gpu:
            begin_s = time.perf_counter()
            call()
            return time.perf_counter() - begin_s
        for _ in range(warm_up):
            call()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                call()
        times: list[float] = []
        for _ in range(rounds):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(float(begin.elapsed_time(end)) / 1e3 / CALLS)
        return statistics.median(times)

    def bandwidth(self) -> float:
        """Bytes a second of a large copy, read and written bytes together: the ceiling for all that moves memory."""
        num_bytes = (1 << 30) if self.is_gpu else (1 << 16)
        source = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * num_bytes / self.seconds(lambda: target.copy_(source))

    def rate(self, dtype: torch.dtype) -> float:
        """Operations a second of a large product: bf16 by torch.matmul, e4m3 by torch._scaled_mm."""
        size = 8192 if self.is_gpu else 64
        a = torch.randn(size, size, device=self.device).to(dtype)
        b = torch.randn(size, size, device=self.device).to(dtype).t()
        if dtype == torch.float8_e4m3fn:
            one = torch.ones((), device=self.device)
            return (
                2
                * size**3
                / self.seconds(lambda: torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16, use_fast_accum=True))
            )
        return 2 * size**3 / self.seconds(lambda: a @ b)
