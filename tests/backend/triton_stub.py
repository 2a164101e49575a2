"""A stand-in for Triton's module, which exists inside the server's stub processes only. Importing it installs it."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Tensor:
    tensor_name: str
    array: np.ndarray

    def name(self) -> str:
        return self.tensor_name

    def as_numpy(self) -> np.ndarray:
        return self.array


@dataclass
class TritonError:
    message: str
    code: str = "INTERNAL"


for _code in ("INTERNAL", "INVALID_ARG", "UNAVAILABLE", "CANCELLED"):
    setattr(TritonError, _code, _code)


@dataclass
class InferenceResponse:
    output_tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None


def _install() -> None:
    module: Any = types.ModuleType("triton_python_backend_utils")
    module.Tensor, module.TritonError, module.InferenceResponse = Tensor, TritonError, InferenceResponse
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    sys.modules.setdefault("triton_python_backend_utils", module)


_install()
