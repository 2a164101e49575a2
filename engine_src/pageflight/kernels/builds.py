"""KernelBuild: one specialisation of a kernel, as it is compiled ahead of time without a GPU.

Every module of kernels lists what serving really launches in a tuple `BUILDS`; `kernels.catalog` gathers them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelBuild:
    """A kernel with the types of its arguments.

    `signature` maps argument names to Triton's types ("*bf16", "*fp8e4nv", "i32", "fp32"); `constants` are its
    `tl.constexpr` arguments. `min_capability`: the least compute capability it is for, times ten (89 where it converts
    to FP8).
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    min_capability: int = 80
