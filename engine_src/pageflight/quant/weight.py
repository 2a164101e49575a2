"""The one in-memory form of a weight, and round-to-nearest int8.

Shapes: N outputs, K inputs, G groups of inputs per output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pageflight.core.errors import ConfigError
from pageflight.models.bits import bf16_values

INT8_LIMIT = 127


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A weight as the engine directory stores it.

    `dtype` F32: float32 values; BF16: bf16 bits in uint16; I8: symmetric int8 [N, K] with float32 `scales` [N, G],
    where column k belongs to group k // (K / G) and the weight is values × scale.
    """

    name: str
    dtype: str
    values: NDArray[Any]
    scales: NDArray[np.float32] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + (self.scales.nbytes if self.scales is not None else 0)

    def rows(self, part: slice) -> Weight:
        """The weight of some outputs only, sharing memory."""
        return Weight(self.name, self.dtype, self.values[part], None if self.scales is None else self.scales[part])

    def float32(self) -> NDArray[np.float32]:
        """The value of every element, whatever the form: the reference of every lowering."""
        if self.dtype == "F32":
            return np.asarray(self.values, np.float32)
        if self.dtype == "BF16":
            return bf16_values(self.values)
        assert self.dtype == "I8" and self.scales is not None, self.dtype
        return dequantise(self.values, self.scales)


def num_groups(num_inputs: int, group_size: int) -> int:
    """Groups per output channel; `group_size` 0 means one. Raises ConfigError for groups that do not fit."""
    if group_size == 0:
        return 1
    if group_size < 0 or num_inputs % group_size:
        raise ConfigError(f"group_size={group_size}: must be 0 (per channel) or divide every input size ({num_inputs})")
    return num_inputs // group_size


def quantise(values: NDArray[np.float32], group_size: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8, round to nearest: int8 [N, K] and float32 scales [N, G]. A group of zeros has scale 1."""
    rows, columns = values.shape
    grouped = values.reshape(rows, num_groups(columns, group_size), -1)
    largest = np.maximum(grouped.max(axis=2), -grouped.min(axis=2))
    scales = np.where(largest > 0, largest / np.float32(INT8_LIMIT), np.float32(1)).astype(np.float32)
    # the smallest numbers divide into scale 0: their group is as good as zero
    scales[scales == 0] = 1
    rounded = np.rint(grouped / scales[:, :, None])
    np.clip(rounded, -INT8_LIMIT, INT8_LIMIT, out=rounded)
    return rounded.astype(np.int8).reshape(rows, columns), scales


def dequantise(values: NDArray[np.int8], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 [N, K] of int8 [N, K] with scales [N, G]."""
    rows, columns = values.shape
    grouped = values.reshape(rows, scales.shape[1], -1).astype(np.float32) * scales[:, :, None]
    return grouped.reshape(rows, columns)
