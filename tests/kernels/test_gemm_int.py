from __future__ import annotations

import numpy as np
import pytest
import reference_dense as reference
import torch
from torch import Tensor

from pageflight.core.errors import ConfigError
from pageflight.kernels import gemm_int
from pageflight.kernels.tuning import Tiles
from pageflight.quant.weight import dequantise, quantise

WHOLE = Tiles(block_t=16, block_n=16, block_k=32)
SPLIT = Tiles(block_t=16, block_n=32, block_k=32, split_k=3)
DTYPES = [torch.float32, torch.float16]


def numbers_of(num_outputs: int, num_inputs: int, greatest: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randint(-greatest, greatest + 1, (num_outputs, num_inputs), generator=generator)
    return numbers.to(torch.int8)


def scales_of(num_outputs: int, num_groups: int) -> Tensor:
    return torch.linspace(0.01, 0.05, num_outputs * num_groups).view(num_outputs, num_groups)


def check(found: Tensor, x: Tensor, numbers: Tensor, scales: Tensor) -> None:
    weight = torch.from_numpy(dequantise(numbers.numpy(), scales.numpy()))
    expected = (x.double() @ weight.double().T).to(x.dtype)
    assert found.dtype == x.dtype
    torch.testing.assert_close(found, expected, rtol=2e-5 if x.dtype == torch.float32 else 1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tiles", [WHOLE, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("shape", [(1, 16, 48), (5, 40, 96), (17, 33, 144)], ids=str)
def test_int8_of_ragged_shapes(shape: tuple[int, int, int], num_groups: int, tiles: Tiles, dtype: torch.dtype) -> None:
    """Groups are of 16, 32 and 48 inputs: a block larger than a group took one scale for two of them."""
    num_tokens, num_outputs, num_inputs = shape
    x, numbers = reference.random_rows(num_tokens, num_inputs, dtype), numbers_of(num_outputs, num_inputs, 127)
    scales = scales_of(num_outputs, num_groups)
    out = torch.full((num_tokens, num_outputs + 3), 9.0, dtype=dtype)
    check(gemm_int.gemm_int8(x, numbers, scales, out=out[:, :num_outputs], tiles=tiles), x, numbers, scales)
    assert bool((out[:, num_outputs:] == 9).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tiles", [WHOLE, SPLIT, Tiles(block_t=16, block_n=16, block_k=64)], ids=["32", "split", "64"])
@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("shape", [(1, 16, 96), (5, 40, 288), (17, 33, 96)], ids=str)
def test_int4_of_ragged_shapes(shape: tuple[int, int, int], num_groups: int, tiles: Tiles, dtype: torch.dtype) -> None:
    num_tokens, num_outputs, num_inputs = shape
    x, numbers = reference.random_rows(num_tokens, num_inputs, dtype), numbers_of(num_outputs, num_inputs, 7)
    scales = scales_of(num_outputs, num_groups)
    found = gemm_int.gemm_int4(x, gemm_int.pack_int4(numbers), scales, tiles=tiles)
    check(found, x, numbers, scales)


def test_each_input_of_a_run_meets_its_own_weight() -> None:
    """Unit vectors read the weights back, one input at a time: halves that were swapped show here."""
    numbers = (torch.arange(16 * 64) % 16 - 8).to(torch.int8).view(16, 64)
    found = gemm_int.gemm_int4(torch.eye(64), gemm_int.pack_int4(numbers), torch.ones(16, 1), tiles=WHOLE)
    assert torch.equal(found.T, numbers.float())


def test_packing_is_what_the_module_says() -> None:
    """Weights on disk outlive the code that packed them."""
    numbers = numbers_of(3, 64, 7)
    packed = gemm_int.pack_int4(numbers)
    assert packed.shape == (3, 32) and packed.dtype == torch.uint8
    assert int(packed[1, 18]) == int(numbers[1, 34] + 8) + 16 * int(numbers[1, 50] + 8)
    assert torch.equal(gemm_int.unpack_int4(packed), numbers)
    with pytest.raises(AssertionError, match="four bits"):
        gemm_int.pack_int4(torch.full((1, 32), 8, dtype=torch.int8))


@pytest.mark.parametrize("group_size", [0, 32])
def test_weights_as_the_engine_stores_them(group_size: int) -> None:
    """The kernel and `quant.weight` must mean the same by numbers, scales and groups."""
    original = np.random.default_rng(0).standard_normal((24, 64)).astype(np.float32)
    numbers, scales = quantise(original, group_size)
    x = reference.random_rows(4, 64, torch.float16)
    check(
        gemm_int.gemm_int8(x, torch.from_numpy(numbers), torch.from_numpy(scales)),
        x,
        *map(torch.from_numpy, (numbers, scales)),
    )


@pytest.mark.parametrize("split_k", [1, 2])
def test_a_bias_is_added_once(split_k: int) -> None:
    x, numbers, scales = reference.random_rows(3, 64, torch.float32), numbers_of(20, 64, 127), scales_of(20, 1)
    tiles = Tiles(block_t=16, block_n=16, block_k=16, split_k=split_k)
    bias = torch.linspace(-1, 1, 20).half()
    without = gemm_int.gemm_int8(x, numbers, scales, tiles=tiles)
    workspace = torch.full((split_k * 3 * 20,), float("nan"))
    found = gemm_int.gemm_int8(x, numbers, scales, bias=bias, tiles=tiles, workspace=workspace)
    torch.testing.assert_close(found, without + bias.float())


def test_groups_that_no_tile_fits_are_refused_with_the_reason() -> None:
    x, numbers, scales = torch.ones(1, 80), numbers_of(16, 80, 127), scales_of(16, 2)
    with pytest.raises(ConfigError, match="group_size=40"):
        gemm_int.gemm_int8(x, numbers, scales)
    packed = gemm_int.pack_int4(numbers_of(16, 96, 7))
    with pytest.raises(ConfigError, match="group_size=16"):
        gemm_int.gemm_int4(torch.ones(1, 96), packed, scales_of(16, 6))


def test_no_tokens_are_no_launch() -> None:
    """A grid of nothing is an error of CUDA."""
    assert gemm_int.gemm_int8(torch.empty(0, 32), numbers_of(16, 32, 127), scales_of(16, 1)).shape == (0, 16)


@pytest.mark.parametrize("kernel", ["gemm_int8", "gemm_int4"])
@pytest.mark.parametrize("group_size", [0, 32])
def test_what_is_measured_is_what_will_be_looked_up(kernel: str, group_size: int) -> None:
    problem = gemm_int.problem(kernel, 2, 16, 64, group_size, torch.float32, "cpu")
    assert problem.key == f"{kernel}/float32/t16/16x64x{group_size or 64}"
    found = problem.launch(WHOLE)
    assert isinstance(found, Tensor) and found.shape == (2, 16)
