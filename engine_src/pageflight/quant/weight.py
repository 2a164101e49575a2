"""The one in-memory form of a weight, whatever method rounded it, and round-to-nearest int8.

Shapes: N outputs, K inputs, G groups of inputs per output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pageflight.core.errors import ConfigError
from pageflight.models.bits import bf16_values
from pageflight.quant.float8 import e4m3_values
from pageflight.quant.int4 import unpack_int4

INT8_LIMIT = 127


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A weight as the engine directory stores it.

    `dtype` F32: float32 values; F16: float16; BF16: bf16 bits in uint16. The quantised ones are codes × float32
    `scales`: I8, symmetric int8 [N, K], and I4, symmetric int4 packed in pairs [N, K / 2], with scales [N, G], where
    column k belongs to group k // (K / G); F8_E4M3, e4m3 bits in uint8 [N, K], with scales [N, 1] (per output) or
    [1, 1] (per tensor).

    Products of F8_E4M3 weights round their activations to e4m3 too, those of I8 weights to int8 where `input_scale`
    is given: it is the activations' scale for all tokens, found by calibration. Without it, F8_E4M3 takes the largest
    magnitude of each token, and I8 leaves activations as they are.
    """

    name: str
    dtype: str
    values: NDArray[Any]
    scales: NDArray[np.float32] | None = None
    input_scale: float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, K] of a matrix, packed or not."""
        rows, *columns = self.values.shape
        return (rows, 2 * columns[0]) if self.dtype == "I4" else self.values.shape

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + (self.scales.nbytes if self.scales is not None else 0)

    def rows(self, part: slice) -> Weight:
        """The weight of some outputs only, sharing memory."""
        scales = self.scales
        if scales is not None and len(scales) == self.shape[0]:  # a scale per tensor holds for its parts
            scales = scales[part]
        return Weight(self.name, self.dtype, self.values[part], scales, self.input_scale)

    def columns(self, part: slice) -> Weight:
        """The weight of some inputs only, sharing memory. A cut through a group makes smaller groups, with scales of
        their own."""
        scales, begin, end = self.scales, part.start, part.stop
        if scales is not None and scales.shape[1] > 1:
            group = self.shape[1] // scales.shape[1]
            smaller = gcd(group, begin, end)
            if smaller == group:
                scales = scales[:, begin // group : end // group]
            else:
                scales = scales[:, np.arange(begin, end, smaller) // group]
        if self.dtype == "I4":
            assert begin % 2 == 0 == end % 2, "a cut goes through a byte"
            begin, end = begin // 2, end // 2
        return Weight(self.name, self.dtype, self.values[:, begin:end], scales, self.input_scale)

    def stacked(self, parts: Sequence[slice]) -> Weight:
        """The weight of several runs of outputs, one after another; sharing memory where it is one."""
        if len(parts) == 1:
            return self.rows(parts[0])
        weights = [self.rows(part) for part in parts]
        scales = self.scales
        if scales is not None and len(scales) == self.shape[0]:
            scales = np.concatenate([weight.scales for weight in weights if weight.scales is not None])
        values = np.concatenate([weight.values for weight in weights])
        return Weight(self.name, self.dtype, values, scales, self.input_scale)

    def float32(self) -> NDArray[np.float32]:
        """The value of every element, whatever the form: the reference of every lowering."""
        if self.dtype in ("F32", "F16"):
            return np.asarray(self.values, np.float32)
        if self.dtype == "BF16":
            return bf16_values(self.values)
        assert self.scales is not None, self.dtype
        return dequantise(self.codes(), self.scales)

    def codes(self) -> NDArray[Any]:
        """What a quantised weight multiplies by its scales, [N, K]: int8, or the values of e4m3 as float32."""
        if self.dtype == "F8_E4M3":
            return e4m3_values(self.values)
        assert self.dtype in ("I8", "I4"), self.dtype
        return unpack_int4(self.values) if self.dtype == "I4" else self.values


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


def dequantise(codes: NDArray[Any], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 [N, K] of codes [N, K] with scales [N, G] or [1, 1]."""
    rows, columns = codes.shape
    grouped = codes.reshape(rows, scales.shape[1], -1).astype(np.float32) * scales[:, :, None]
    return grouped.reshape(rows, columns)
