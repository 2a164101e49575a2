from __future__ import annotations

import pytest
import reference_dense as reference
import torch
import triton
import triton.language as tl

from pageflight.kernels import activation

DTYPES = [torch.float32, torch.float16]


@triton.jit
def round_trip_kernel(x, out, size, TILE: tl.constexpr):
    places = tl.arange(0, TILE)
    values = tl.load(x + places, mask=places < size, other=0.0)
    tl.store(out + places, activation.to_e4m3(values), mask=places < size)


def test_conversion_to_fp8_is_to_nearest_with_ties_to_even() -> None:
    """Every e4m3 number, every midpoint between two, both sides of the midpoint, and what lies beyond the range."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    values = torch.cat([numbers, middles, middles * (1 + 2e-7), middles * (1 - 2e-7), torch.tensor([460.0, 1e30])])
    values = torch.cat([values, -values, torch.tensor([float("inf"), 1e-30])])
    found = torch.empty(len(values), dtype=torch.float8_e4m3fn)
    round_trip_kernel[(1,)](values, found, len(values), TILE=triton.next_power_of_2(len(values)))
    assert torch.equal(found.float(), values.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    nan = torch.empty(1, dtype=torch.float8_e4m3fn)
    round_trip_kernel[(1,)](torch.tensor([float("nan")]), nan, 1, TILE=1)
    assert bool(nan.float().isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (3, 70), (2, 1100)], ids=str)
def test_silu_mul_is_rounded_once(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up = reference.random_rows(shape[0], 2 * shape[1], dtype) * 4
    found = activation.silu_mul(gate_up)
    assert found.dtype == dtype
    torch.testing.assert_close(found, reference.silu_mul(gate_up).to(dtype), rtol=1e-6, atol=1e-7)


def test_a_gate_far_below_zero_closes() -> None:
    """exp(-x) of it is infinite; inf / inf is no number."""
    gate_up = torch.tensor([[-1e4, -200.0, 1e4, 0.0, 3.0, 3.0, 3.0, 3.0]])
    found = activation.silu_mul(gate_up)
    assert found.tolist() == [[0.0, 0.0, 3e4, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_mul_with_a_given_scale(dtype: torch.dtype) -> None:
    gate_up, scale = reference.random_rows(3, 2 * 70, dtype) * 4, torch.tensor([0.031])
    found, scale_out = activation.silu_mul_fp8(gate_up, scale=scale)
    assert scale_out is scale
    assert reference.fp8_steps_apart(found, reference.to_fp8(reference.silu_mul(gate_up), scale)) <= 1


@pytest.mark.parametrize("size", [16, 70, 1100])
def test_silu_mul_with_a_scale_for_each_token(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "_MAX_TILE", 256)  # several tiles of one row
    gate_up = reference.random_rows(3, 2 * size, torch.float16) * 4
    gate_up[1] = 0
    found, scales = activation.silu_mul_fp8(gate_up)
    expected = reference.silu_mul(gate_up)
    torch.testing.assert_close(scales, reference.token_scales(expected), rtol=1e-6, atol=0)
    assert reference.fp8_steps_apart(found, reference.to_fp8(expected, scales[:, None])) <= 1
    assert float(scales[1]) == 1.0 and bool((found[1].float() == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 300])
def test_plain_quantisation_by_each_kind_of_scale(
    dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activation, "_MAX_TILE", 128)
    x = reference.random_rows(4, size, dtype) * 10
    x[2] = 0
    given = torch.tensor([0.02])
    assert torch.equal(activation.quantise_fp8(x, given).float(), reference.to_fp8(x.float(), given).float())
    found, scales = activation.quantise_fp8_per_token(x)
    assert torch.equal(scales, reference.token_scales(x))
    assert torch.equal(found.float(), reference.to_fp8(x.float(), scales[:, None]).float())
    found, scale = activation.quantise_fp8_per_tensor(x)
    assert torch.equal(scale, x.float().abs().max()[None] / 448)
    assert torch.equal(found.float(), reference.to_fp8(x.float(), scale).float())


def test_scales_of_zeros_and_of_the_smallest_numbers_are_one() -> None:
    """Their greatest magnitude / 448 is 0 on a card that flushes what is below normal: everything was NaN."""
    x = torch.full((2, 16), 1e-40)
    x[0] = 0
    found, scales = activation.quantise_fp8_per_token(x)
    assert scales.tolist() == [1.0, 1.0] and bool((found.float() == 0).all())
    assert activation.quantise_fp8_per_tensor(x)[1].tolist() == [1.0]


def test_a_nan_makes_its_token_nan_and_no_other() -> None:
    x = torch.ones(3, 16)
    x[1, 5] = float("nan")
    found, scales = activation.quantise_fp8_per_token(x)
    assert found.float().isnan().any(1).tolist() == [False, True, False]
    assert scales.isnan().tolist() == [False, True, False]
    assert bool(activation.quantise_fp8_per_tensor(x)[1].isnan())


def test_no_tokens_are_no_launch() -> None:
    """A grid of nothing is an error of CUDA."""
    assert activation.silu_mul(torch.empty(0, 32)).shape == (0, 16)
    assert activation.silu_mul_fp8(torch.empty(0, 32))[1].shape == (0,)
    found, scale = activation.quantise_fp8_per_tensor(torch.empty(0, 16))
    assert found.shape == (0, 16) and scale.tolist() == [1.0]
