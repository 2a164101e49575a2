"""e4m3 in numpy against torch's own type, and weights rounded to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pageflight.quant.float8 import E4M3_LIMIT, e4m3_bits, e4m3_values, quantise_fp8

CODES = np.arange(256, dtype=np.uint8)


def torch_values(bits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(bits.copy()).view(torch.float8_e4m3fn).float().numpy()


def torch_bits(values: np.ndarray) -> np.ndarray:
    clamped = torch.from_numpy(values).clamp(-E4M3_LIMIT, E4M3_LIMIT)
    return clamped.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def test_all_codes_have_the_value_that_torch_gives_them() -> None:
    """The numbers below the smallest normal one were half of what they should be."""
    np.testing.assert_array_equal(e4m3_values(CODES), torch_values(CODES))


def test_all_codes_come_back() -> None:
    """-0.0 lost its sign, NaN became 480."""
    numbers = CODES[(CODES & 0x7F) != 0x7F]
    np.testing.assert_array_equal(e4m3_bits(e4m3_values(numbers)), numbers)
    assert np.isnan(e4m3_values(e4m3_bits(np.array([np.nan, -np.nan], np.float32)))).all()


def test_values_between_the_codes_go_where_torch_sends_them() -> None:
    """Ties went away from zero: a bias that no single value shows."""
    finite = np.unique(e4m3_values(CODES[(CODES & 0x7F) != 0x7F]))
    ties = (finite[1:] + finite[:-1]) / 2
    beside = np.concatenate([np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))])
    random = np.random.default_rng(0)
    spread = random.standard_normal(20_000) * np.exp2(random.uniform(-14, 12, 20_000))
    edges = [0.0, -0.0, 448.0, 463.9, 464.0, 465.0, 1e9, -1e30, 1e-45, -1e-12, 2.0**-10, 2.0**-9, 2.0**-6]
    values = np.concatenate([ties, beside, spread, edges]).astype(np.float32)
    np.testing.assert_array_equal(e4m3_bits(values), torch_bits(values))


def test_what_is_too_large_becomes_the_largest() -> None:
    """Infinity became NaN, and with it every logit."""
    assert e4m3_values(e4m3_bits(np.array([np.inf, -np.inf, 500], np.float32))).tolist() == [448, -448, 448]


@pytest.mark.parametrize("per_tensor", [False, True])
def test_weights_are_within_half_a_step_of_what_they_were(per_tensor: bool) -> None:
    """A scale for the whole weight was applied to its first row only."""
    values = np.random.default_rng(1).standard_normal((6, 64)).astype(np.float32)
    values[2] *= 50
    values[4] = 0
    bits, scales = quantise_fp8(values, float(np.abs(values).max()) if per_tensor else None)
    assert scales.shape == ((1, 1) if per_tensor else (6, 1))
    widest = np.maximum(np.abs(values) / 16, scales * 2.0**-10 * 1.001)  # half a step: 3 mantissa bits, or subnormal
    assert (np.abs(e4m3_values(bits) * scales - values) <= widest).all()
    assert np.abs(e4m3_values(bits)).max() == E4M3_LIMIT


def test_zeros_and_the_smallest_numbers_stay_finite() -> None:
    """A row of zeros divided by its own largest value."""
    values = np.zeros((2, 4), np.float32)
    values[1] = 1e-45
    bits, scales = quantise_fp8(values)
    assert np.isfinite(e4m3_values(bits) * scales).all() and (scales > 0).all()
