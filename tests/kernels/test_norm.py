from __future__ import annotations

import pytest
import reference_dense as reference
import torch

from pageflight.kernels import norm

EPSILON = 1e-5
DTYPES = [torch.float32, torch.float16]


def weight_of(size: int, dtype: torch.dtype) -> torch.Tensor:
    return 1 + 0.3 * reference.random_rows(1, size, dtype, seed=9)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (3, 64), (5, 77), (2, 300)], ids=str)
def test_rms_norm_is_rounded_once(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Rounded before the weight as well, fp16 results were one step off in a tenth of the places."""
    x, weight = reference.random_rows(*shape, dtype), weight_of(shape[1], dtype)
    found = norm.rms_norm(x, weight, EPSILON)
    assert found.dtype == dtype
    torch.testing.assert_close(found, reference.rms_norm(x, weight, EPSILON).to(dtype), rtol=1e-6, atol=1e-7)


def test_rows_that_are_part_of_wider_ones_are_found_by_their_stride() -> None:
    """Q and K lie side by side in the output of one product."""
    wide, weight = reference.random_rows(4, 96, torch.float32), weight_of(32, torch.float32)
    out = torch.full((4, 40), 7.0)
    norm.rms_norm(wide[:, 32:64], weight, EPSILON, out=out[:, :32])
    torch.testing.assert_close(out[:, :32], reference.rms_norm(wide[:, 32:64], weight, EPSILON))
    assert bool((out[:, 32:] == 7).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_fused_sum_equals_adding_and_then_norming_bit_for_bit(dtype: torch.dtype) -> None:
    """The sum that is normed must be the one later layers read, not one with more digits."""
    x, residual = reference.random_rows(3, 77, dtype), reference.random_rows(3, 77, dtype, seed=1)
    weight = weight_of(77, dtype)
    expected_sum = x + residual
    expected = norm.rms_norm(expected_sum, weight, EPSILON)
    found = norm.add_rms_norm(x, residual, weight, EPSILON)
    assert torch.equal(residual, expected_sum)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("add", [False, True])
def test_a_static_scale_divides_before_the_one_rounding(dtype: torch.dtype, add: bool) -> None:
    x, residual = reference.random_rows(3, 77, dtype), reference.random_rows(3, 77, dtype, seed=1)
    weight, scale = weight_of(77, dtype), torch.tensor([0.0078])
    total = x + residual if add else x
    expected = reference.to_fp8(reference.rms_norm(total, weight, EPSILON), scale)
    if add:
        found, scale_out = norm.add_rms_norm_fp8(x, residual, weight, EPSILON, scale=scale)
        assert torch.equal(residual, total)
    else:
        found, scale_out = norm.rms_norm_fp8(x, weight, EPSILON, scale=scale)
    assert scale_out is scale
    assert reference.fp8_steps_apart(found, expected) <= 1
    assert float((found.float() == expected.float()).float().mean()) > 0.98


def test_what_is_beyond_448_saturates() -> None:
    """A plain conversion makes NaN of it, and one outlier then silences a whole sequence."""
    x, weight = torch.tensor([[1.0, -1.0, 0.001, -2.0]]), torch.full((4,), 1000.0)
    found, _ = norm.rms_norm_fp8(x, weight, EPSILON, scale=torch.ones(1))
    assert found.float()[0, [0, 1, 3]].tolist() == [448.0, -448.0, -448.0]
    assert 0 < float(found.float()[0, 2]) < 1


@pytest.mark.parametrize("add", [False, True])
def test_each_token_gets_the_scale_that_its_greatest_value_needs(add: bool) -> None:
    x, residual = reference.random_rows(4, 77, torch.float16), reference.random_rows(4, 77, torch.float16, seed=1)
    weight = weight_of(77, torch.float16)
    normed = reference.rms_norm(x + residual if add else x, weight, EPSILON)
    out, scales = torch.empty(4, 77, dtype=torch.float8_e4m3fn), torch.empty(4)
    if add:
        found, found_scales = norm.add_rms_norm_fp8(x, residual, weight, EPSILON, out=out, scales_out=scales)
    else:
        found, found_scales = norm.rms_norm_fp8(x, weight, EPSILON, out=out, scales_out=scales)
    assert found is out and found_scales is scales
    torch.testing.assert_close(scales, reference.token_scales(normed), rtol=1e-6, atol=0)
    assert reference.fp8_steps_apart(found, reference.to_fp8(normed, scales[:, None])) <= 1
    assert bool((found.float().abs().amax(1) == 448).all()), "the whole range is used"


def test_a_row_of_zeros_has_scale_one_and_stays_zeros() -> None:
    """Its greatest magnitude is 0: divided by, all of the row was NaN."""
    x = torch.zeros(2, 32)
    x[1] = 1.0
    found, scales = norm.rms_norm_fp8(x, torch.ones(32), EPSILON)
    assert float(scales[0]) == 1.0
    assert bool((found[0].float() == 0).all())
    assert bool((found[1].float() == 448).all())


def test_a_nan_stays_one_in_its_own_row() -> None:
    """Clamped to 448, a broken token went on as a plausible one and nobody could tell."""
    x = torch.ones(2, 32)
    x[0, 3] = float("nan")
    found, scales = norm.rms_norm_fp8(x, torch.ones(32), EPSILON)
    assert bool(found[0].float().isnan().all()) and bool(scales[0].isnan())
    assert not bool(found[1].float().isnan().any()) and not bool(scales[1].isnan())


def test_no_tokens_are_no_launch() -> None:
    """A grid of nothing is an error of CUDA."""
    x, weight = torch.empty(0, 16), torch.ones(16)
    assert norm.rms_norm(x, weight, EPSILON).shape == (0, 16)
    assert norm.rms_norm_fp8(x, weight, EPSILON)[1].shape == (0,)
