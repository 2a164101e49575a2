"""Symmetric int4 in groups, packed in pairs."""

from __future__ import annotations

import numpy as np
import pytest

from pageflight.core.errors import ConfigError
from pageflight.models.bits import bf16_bits, bf16_values
from pageflight.quant.int4 import pack_int4, quantise_int4, unpack_int4
from pageflight.quant.weight import Weight


def test_packed_codes_come_back() -> None:
    """Negative codes came back 16 too large."""
    codes = np.array([[i, j] for i in range(-8, 8) for j in range(-8, 8)], np.int8)
    packed = pack_int4(codes)
    assert packed.dtype == np.uint8 and packed.shape == (256, 1)
    np.testing.assert_array_equal(unpack_int4(packed), codes)


def test_the_even_column_is_in_the_low_half() -> None:
    """Every pair of inputs was swapped; the model still spoke, a little worse."""
    assert pack_int4(np.array([[1, 2, -1, 0]], np.int8)).tolist() == [[0x21, 0x0F]]


@pytest.mark.parametrize("group_size", [0, 8, 16])
def test_every_value_is_within_half_a_step_of_its_group(group_size: int) -> None:
    """The scale was rounded down after the codes were chosen: the largest values were cut off."""
    values = np.random.default_rng(0).standard_normal((6, 32)).astype(np.float32)
    values[:, 8:16] *= 100
    packed, scales = quantise_int4(values, group_size)
    assert scales.shape == (6, 1 if group_size == 0 else 32 // group_size)
    steps = np.repeat(scales, 32 // scales.shape[1], axis=1)
    cut = 7 * 2.0**-8  # a scale that bf16 rounds down cannot reach the largest value, by as much
    weight = Weight("w", "I4", packed, scales)
    assert weight.shape == (6, 32)
    assert (np.abs(weight.float32() - values) <= steps * (0.5 + cut)).all()
    np.testing.assert_array_equal(bf16_values(bf16_bits(scales)), scales)


def test_rows_of_a_weight_are_the_weight_of_those_rows() -> None:
    """Gate and up are halves of one matrix; packed codes and scales must follow them."""
    weight = Weight("w", "I4", *quantise_int4(np.random.default_rng(1).standard_normal((6, 16)).astype(np.float32), 8))
    np.testing.assert_array_equal(weight.rows(slice(2, 5)).float32(), weight.float32()[2:5])


@pytest.mark.parametrize(("columns", "group_size"), [(32, 3), (32, -8), (32, 64), (33, 0)])
def test_what_cannot_be_packed_is_refused(columns: int, group_size: int) -> None:
    """The last input of an odd row was paired with the first one of the next."""
    with pytest.raises(ConfigError, match=r"int4|group_size"):
        quantise_int4(np.ones((2, columns), np.float32), group_size)
