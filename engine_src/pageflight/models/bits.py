"""Conversions between float32 and bf16 carried as uint16 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round finite float32 to bf16, ties to even. Shape is kept. Values beyond bf16's range become infinite."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return rounded


def bf16_values(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 value of each bf16, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_float32(array: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """A stored tensor (safetensors dtype F64, F32, F16 or BF16) as float32."""
    return bf16_values(array) if dtype == "BF16" else np.asarray(array, np.float32)
