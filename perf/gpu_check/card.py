"""The card at hand: what it is, what it can do at most, and how long a call takes on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton

from pageflight.kernels.timing import cold_seconds

Record = dict[str, object]
"""What a check found; `failed` in it says what is wrong, `skipped` why nothing was checked."""


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

    def seconds(self, call: Callable[[], object]) -> float:
        """Median time of a call on the GPU, launched by no host, whose arguments come from memory and from no cache."""
        if not self.is_gpu:
            begin_s = time.perf_counter()
            call()
            return time.perf_counter() - begin_s
        call()  # compiles
        return cold_seconds(call, self.device)

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
