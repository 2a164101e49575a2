"""Symmetric int4 in groups, two codes per byte: an even column in the low half, the next one in the high half.

Shapes: N outputs, K inputs, G groups of inputs per output.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pageflight.core.errors import ConfigError
from pageflight.models.bits import bf16_bits, bf16_values

INT4_LIMIT = 7  # -8 has no opposite
GROUP_SIZES = (128, 64, 32)
"""Inputs per scale that kernels are made for, the one with the fewest scales first."""


def pack_int4(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Codes -8 to 7 [N, K] as uint8 [N, K / 2]. K must be even."""
    assert codes.shape[1] % 2 == 0, codes.shape
    halves = codes.view(np.uint8) & np.uint8(0xF)
    packed: NDArray[np.uint8] = halves[:, 0::2] | (halves[:, 1::2] << np.uint8(4))
    return packed


def unpack_int4(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """What `pack_int4` packed."""
    codes = np.empty((packed.shape[0], 2 * packed.shape[1]), np.int8)
    codes[:, 0::2] = packed & 0xF
    codes[:, 1::2] = packed >> 4
    codes -= np.int8(16) * (codes > INT4_LIMIT)
    return codes


def quantise_int4(values: NDArray[np.float32], group_size: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Round to nearest: packed codes [N, K / 2] and float32 scales [N, G]. A group of zeros has scale 1.

    Scales are rounded to bf16 first and the codes chosen for what that gives: engines that multiply in bf16 lose
    nothing then. Raises ConfigError for groups that do not fit.
    """
    rows, columns = values.shape
    check_int4_groups(columns, group_size)
    grouped = values.reshape(rows, columns // (group_size or columns), -1)
    largest = np.maximum(grouped.max(axis=2), -grouped.min(axis=2))
    scales = bf16_values(bf16_bits(largest / np.float32(INT4_LIMIT)))
    scales[scales == 0] = 1
    codes = np.rint(grouped / scales[:, :, None])
    np.clip(codes, -INT4_LIMIT, INT4_LIMIT, out=codes)
    return pack_int4(codes.astype(np.int8).reshape(rows, columns)), scales


def check_int4_groups(num_inputs: int, group_size: int) -> None:
    """Raises ConfigError unless `num_inputs` can be packed in pairs and cut into groups (0: one per output)."""
    if num_inputs % 2:
        raise ConfigError(f"dtype='int4': packs pairs of inputs, but a weight has {num_inputs} of them")
    if group_size < 0 or (group_size and num_inputs % group_size):
        raise ConfigError(f"group_size={group_size}: must be 0 (per channel) or divide every input size ({num_inputs})")
