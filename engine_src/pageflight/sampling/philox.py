"""Counter-based random numbers: a pure function of what is drawn, with no state to carry, save or order.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_ROUNDS = 10

Words = NDArray[np.uint64]


def philox4x32(
    counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]
) -> tuple[Words, Words, Words, Words]:
    """Ten rounds over 32-bit words, held in uint64 arrays of one shape (broadcasting allowed)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for number in range(_ROUNDS):
        product_0, product_1 = _MULTIPLIER_0 * c0, _MULTIPLIER_1 * c2
        round_0 = (k0 + np.uint64(number * _WEYL_0)) & _LOW
        round_1 = (k1 + np.uint64(number * _WEYL_1)) & _LOW
        c0, c1, c2, c3 = (
            (product_1 >> _SHIFT) ^ c1 ^ round_0,
            product_1 & _LOW,
            (product_0 >> _SHIFT) ^ c3 ^ round_1,
            product_0 & _LOW,
        )
    return c0, c1, c2, c3


def uniforms(seeds: Words, sequence_indices: Words, positions: Words) -> NDArray[np.float64]:
    """One number in [0, 1) for each (64-bit seed, sequence index, position): multiples of 2^-53.

    The seed is Philox's key; position and sequence index are its counter, so neighbouring positions are as independent
    as Philox's consecutive outputs.
    """
    zero = np.zeros_like(seeds)
    high, low, _, _ = philox4x32(
        (positions & _LOW, positions >> _SHIFT, sequence_indices & _LOW, zero), (seeds & _LOW, seeds >> _SHIFT)
    )
    bits: NDArray[np.uint64] = (high << np.uint64(21)) ^ (low >> np.uint64(11))
    return bits.astype(np.float64) * 2.0**-53
