"""What holds for all tests."""

from __future__ import annotations

import os

# Kernels decide at import whether they run on a GPU or in Triton's interpreter, on tensors of the CPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
