"""The 8-bit float e4m3 (finite, no infinities) carried as uint8 bits, and round-to-nearest weights in it.

Format: sign, 4 exponent bits with bias 7, 3 mantissa bits; 0x7F and 0xFF are NaN, the largest value is 448
(Micikevicius et al., FP8 Formats for Deep Learning, 2022).

Shapes: N outputs, K inputs.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

E4M3_LIMIT = 448.0
SMALLEST_PEAK = 1e-12
"""What the largest activation of a token is taken to be at least, where each token has a scale: zeros divide by it."""
_NAN, _LARGEST_CODE = 0x7F, 0x7E
_SMALLEST_NORMAL = np.float32(2.0**-6)
_SUBNORMAL_STEPS = np.float32(2.0**9)  # per unit: what lies below the smallest normal number is a multiple of 2 ** -9
_DROPPED_BITS = 20  # float32 has 23 mantissa bits, e4m3 has 3
_REBIAS = (127 - 7) << 3


def e4m3_values(bits: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The float32 value of each e4m3 number, exactly."""
    return _table()[bits]


def e4m3_bits(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round float32 to e4m3, ties to even, what lies beyond ±448 to ±448. NaN stays NaN. Shape is kept."""
    values = np.ascontiguousarray(values, np.float32)
    magnitudes = np.abs(values)
    bits = magnitudes.view(np.uint32)
    tie_breaker = ((bits >> _DROPPED_BITS) & 1) + np.uint32((1 << (_DROPPED_BITS - 1)) - 1)
    normal = np.minimum(((bits + tie_breaker) >> _DROPPED_BITS).astype(np.int32) - _REBIAS, _LARGEST_CODE)
    subnormal = np.rint(np.minimum(magnitudes, _SMALLEST_NORMAL) * _SUBNORMAL_STEPS)
    subnormal[np.isnan(subnormal)] = 0  # decided below; a cast of NaN is whatever the processor likes
    codes = np.where(magnitudes < _SMALLEST_NORMAL, subnormal.astype(np.int32), normal)
    codes = np.where(np.isnan(values), _NAN, codes) | (np.signbit(values).astype(np.int32) << 7)
    narrow: NDArray[np.uint8] = codes.astype(np.uint8)
    return narrow


def quantise_fp8(
    values: NDArray[np.float32], largest: float | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Weights [N, K] as e4m3 bits [N, K] and float32 scales: value = e4m3 × scale.

    Scales are [N, 1], one per output; with `largest`, the greatest magnitude of the whole weight, [1, 1]. A row of
    zeros has scale 1.
    """
    peaks = np.abs(values).max(axis=1, keepdims=True) if largest is None else np.full((1, 1), largest, np.float32)
    scales = np.where(peaks > 0, peaks / np.float32(E4M3_LIMIT), np.float32(1)).astype(np.float32)
    scales[scales == 0] = 1  # the smallest numbers divide into scale 0: their row is as good as zero
    return e4m3_bits(values / scales), scales


@cache
def _table() -> NDArray[np.float32]:
    codes = np.arange(256)
    exponents, mantissas = (codes >> 3) & 0xF, codes & 0x7
    normal = np.ldexp(1 + mantissas / 8, exponents - 7)
    values = np.where(exponents == 0, np.ldexp(mantissas / 8, -6), normal)
    values[(codes & 0x7F) == _NAN] = np.nan
    table: NDArray[np.float32] = np.where(codes & 0x80, -values, values).astype(np.float32)
    table.flags.writeable = False
    return table
