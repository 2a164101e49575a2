"""What holds for all tests."""

from __future__ import annotations

import os

import pytest

# Kernels decide at import whether they run on a GPU or in Triton's interpreter, on tensors of the CPU.
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def rounds_to_e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter rounds float32 to e4m3 wrongly (127 becomes 64): as a GPU does, for tests that compare."""
    import numpy as np
    import torch
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(numbers: np.ndarray, source: object, target: object, mode: object) -> np.ndarray:
        if str(source) != "fp32" or str(target) != "fp8e4nv":
            return convert(numbers, source, target, mode)
        codes = torch.from_numpy(np.ascontiguousarray(numbers)).to(torch.float8_e4m3fn)
        return codes.view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
