"""Symmetric int8, round to nearest."""

from __future__ import annotations

import numpy as np
import pytest

from pageflight.core.errors import ConfigError
from pageflight.quant.weight import Weight, dequantise, quantise


@pytest.mark.parametrize("group_size", [0, 8, 16])
def test_every_value_is_within_half_a_step_of_its_group(group_size: int) -> None:
    """A scale taken over the whole row lost the small groups."""
    values = np.random.default_rng(0).standard_normal((6, 32)).astype(np.float32)
    values[:, 8:16] *= 100
    codes, scales = quantise(values, group_size)
    assert codes.dtype == np.int8
    assert scales.shape == (6, 1 if group_size == 0 else 32 // group_size)
    steps = np.repeat(scales, 32 // scales.shape[1], axis=1)
    assert (np.abs(dequantise(codes, scales) - values) <= steps * 0.5001).all()
    assert codes.min() >= -127, "-128 has no opposite"


def test_zeros_and_the_smallest_numbers_stay_finite() -> None:
    """A group of zeros divided by its own largest value."""
    values = np.zeros((2, 4), np.float32)
    values[1] = 1e-45
    codes, scales = quantise(values, 0)
    assert np.isfinite(dequantise(codes, scales)).all()
    assert not codes.any()
    assert (scales > 0).all()


@pytest.mark.parametrize("group_size", [3, -8, 64])
def test_groups_that_do_not_fit_are_refused(group_size: int) -> None:
    """The last group of a row reached into the next one."""
    with pytest.raises(ConfigError, match=f"group_size={group_size}"):
        quantise(np.ones((2, 32), np.float32), group_size)


def test_rows_of_a_weight_are_the_weight_of_those_rows() -> None:
    """Gate and up are halves of one matrix; their scales must follow them."""
    codes, scales = quantise(np.random.default_rng(1).standard_normal((6, 16)).astype(np.float32), 8)
    weight = Weight("w", "I8", codes, scales)
    np.testing.assert_array_equal(weight.rows(slice(2, 5)).float32(), weight.float32()[2:5])
    assert weight.num_bytes == 6 * 16 + 6 * 2 * 4
