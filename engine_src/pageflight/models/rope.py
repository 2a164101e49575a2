"""Rotary position embedding as tables: one row of cosines and one of sines per position."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pageflight.models.config import DecoderConfig, RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> NDArray[np.float32]:
    """Angle per position of each feature pair, float32 [head_dim / 2], scaled as `rope` says."""
    inverse: NDArray[np.float32]
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inverse = (1.0 / np.power(np.float64(rope.theta), exponents.astype(np.float64))).astype(np.float32)
    if rope.scaling == "linear":
        inverse = (inverse / np.float32(rope.factor)).astype(np.float32)
    elif rope.scaling == "llama3":
        wavelengths = 2 * math.pi / inverse
        slow = rope.original_max_positions / rope.low_freq_factor
        fast = rope.original_max_positions / rope.high_freq_factor
        blend = (rope.original_max_positions / wavelengths - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        blended = (1 - blend) * inverse / rope.factor + blend * inverse
        scaled = np.where(wavelengths > slow, inverse / rope.factor, inverse)
        between = (wavelengths <= slow) & (wavelengths >= fast)
        inverse = np.where(between, blended, scaled).astype(np.float32)
    else:
        assert rope.scaling == "default", rope.scaling
    return inverse


def rope_tables(config: DecoderConfig, num_positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines, float32 [num_positions, head_dim]; the second half of a row repeats the first.

    Angles are rounded to float32 before the cosine, as the models were trained.
    """
    inverse = inverse_frequencies(config.rope, config.head_dim)
    angles = np.outer(np.arange(num_positions, dtype=np.float32), inverse)
    full = np.concatenate([angles, angles], axis=1)
    return np.cos(full), np.sin(full)
