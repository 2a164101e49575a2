from __future__ import annotations

from collections.abc import Mapping

import pytest
import reference_dense as reference
import torch
from torch import Tensor

from pageflight.kernels import gemm_fp8, tuning
from pageflight.kernels.tuning import Choice, Tiles

SMALL = Tiles(block_t=16, block_n=16, block_k=32)


def operands(
    num_tokens: int, num_outputs: int, num_inputs: int, per_token: bool = False, per_channel: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = reference.random_rows(num_tokens, num_inputs, torch.float32).to(reference.FP8)
    weight = reference.random_rows(num_outputs, num_inputs, torch.float32, seed=1).to(reference.FP8)
    x_scale = torch.linspace(0.5, 2.0, num_tokens) if per_token else torch.tensor([0.7])
    weight_scale = torch.linspace(0.1, 0.3, num_outputs) if per_channel else torch.tensor([0.2])
    return x, weight, x_scale, weight_scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tiles", [SMALL, Tiles(block_t=16, block_n=32, block_k=32, split_k=3)], ids=["whole", "split"])
@pytest.mark.parametrize("shape", [(1, 16, 32), (5, 40, 96), (17, 33, 80), (33, 16, 16)], ids=str)
def test_the_product_of_ragged_shapes(shape: tuple[int, int, int], tiles: Tiles, dtype: torch.dtype) -> None:
    """Rows, columns and inputs behind the last of each were summed too, or stored over the neighbours."""
    x, weight, x_scale, weight_scale = operands(*shape, per_token=True, per_channel=True)
    out = torch.full((shape[0], shape[1] + 3), 9.0, dtype=dtype)
    found = gemm_fp8.gemm_fp8(x, weight, x_scale, weight_scale, out=out[:, : shape[1]], tiles=tiles)
    expected = reference.fp8_product(x, weight, x_scale, weight_scale)
    torch.testing.assert_close(found, expected.to(dtype), rtol=2e-5 if dtype == torch.float32 else 1e-3, atol=1e-5)
    assert bool((out[:, shape[1] :] == 9).all())


@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_each_kind_of_scale_with_a_bias(per_token: bool, per_channel: bool, split_k: int) -> None:
    """A bias added in every part of a split counts as often as there are parts."""
    x, weight, x_scale, weight_scale = operands(5, 20, 64, per_token, per_channel)
    bias = torch.linspace(-1, 1, 20).half()
    tiles = Tiles(block_t=16, block_n=16, block_k=32, split_k=split_k)
    found = gemm_fp8.gemm_fp8(x, weight, x_scale, weight_scale, bias=bias, out_dtype=torch.float32, tiles=tiles)
    expected = reference.fp8_product(x, weight, x_scale, weight_scale) + bias.float()
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-5)


def test_more_parts_than_tiles_of_inputs_leave_empty_parts_zero() -> None:
    """The workspace is reused from step to step: what a part did not write was an older step's."""
    x, weight, x_scale, weight_scale = operands(3, 16, 40)
    workspace = torch.full((8 * 3 * 16,), float("nan"))
    found = gemm_fp8.gemm_fp8(
        x,
        weight,
        x_scale,
        weight_scale,
        out_dtype=torch.float32,
        tiles=Tiles(block_t=16, block_n=16, block_k=32, split_k=8),
        workspace=workspace,
    )
    torch.testing.assert_close(found, reference.fp8_product(x, weight, x_scale, weight_scale), rtol=2e-5, atol=1e-5)


def test_many_tiles_are_each_computed_once() -> None:
    """Programs are numbered eight rows of tiles at a time; the last, lower band was numbered as if it were whole."""
    x, weight, x_scale, weight_scale = operands(16 * 11 - 3, 16 * 3 - 1, 32)
    found = gemm_fp8.gemm_fp8(x, weight, x_scale, weight_scale, out_dtype=torch.float32, tiles=SMALL)
    torch.testing.assert_close(found, reference.fp8_product(x, weight, x_scale, weight_scale), rtol=2e-5, atol=1e-5)


def test_no_tokens_are_no_launch() -> None:
    """A grid of nothing is an error of CUDA."""
    x, weight, x_scale, weight_scale = operands(0, 16, 32)
    assert gemm_fp8.gemm_fp8(x, weight, x_scale, weight_scale).shape == (0, 16)
    assert gemm_fp8.scaled_mm(x, weight, x_scale, weight_scale).shape == (0, 16)


@pytest.mark.parametrize("num_tokens", [1, 8, 33, 128, 129, 4000])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(4096, 4096), (28672, 4096), (4096, 14336), (64, 64)])
def test_default_tiles_fit_the_hardware(num_tokens: int, num_outputs: int, num_inputs: int) -> None:
    """Shared memory of the smallest card with FP8 (99 KiB on 8.9) holds the tiles of all stages but the last."""
    tiles = gemm_fp8.default_tiles(num_tokens, num_outputs, num_inputs)
    assert (tiles.block_t + tiles.block_n) * tiles.block_k * (tiles.num_stages - 1) <= 99 * 1024
    assert min(tiles.block_t, tiles.block_n) >= 16 and tiles.block_k >= 32
    assert tiles.split_k * tiles.block_k <= max(num_inputs, tiles.block_k)


def test_measured_tiles_come_before_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    tiles = Tiles(block_t=16, block_n=16, block_k=32, split_k=2)

    def stored(device: torch.device) -> Mapping[str, Choice]:
        used.append(1)
        return {"gemm_fp8/float32/t16/16x64": Choice(tiles=tiles, microseconds=1.0)}

    monkeypatch.setattr(tuning, "stored", stored)
    x, weight, x_scale, weight_scale = operands(3, 16, 64)
    too_small = torch.empty(2 * 3 * 16 - 1)
    with pytest.raises(AssertionError):  # only a split product looks at its workspace
        gemm_fp8.gemm_fp8(x, weight, x_scale, weight_scale, out_dtype=torch.float32, workspace=too_small)
    assert used


def test_the_library_is_not_asked_for_what_it_refuses() -> None:
    """Each of these is an exception of torch._scaled_mm in the middle of a step."""
    x, weight, one, _ = operands(4, 32, 64)
    per_token, per_channel = torch.ones(4), torch.ones(32)
    bf16, fp32 = torch.empty(4, 32, dtype=torch.bfloat16), torch.empty(4, 32)
    can = gemm_fp8.library_can
    assert can(x, weight, one, one, None, bf16) and can(x, weight, one, one, None, fp32)
    assert can(x, weight, per_token, per_channel, torch.ones(32, dtype=torch.bfloat16), bf16)
    assert not can(x, weight, per_token, per_channel, None, fp32)
    assert not can(x, weight, one, per_channel, None, bf16)
    assert not can(x, weight, one, one, torch.ones(32), fp32)
    assert not can(x, weight, one, one, torch.ones(32), bf16)
    assert not can(x[:, :40].contiguous(), weight[:, :40].contiguous(), one, one, None, bf16)
    assert not can(x, weight[:24], one, one, None, bf16)
    assert not can(x[:, ::2], weight[:, ::2], one, one, None, bf16)
    assert not can(x, weight, one, one, None, torch.empty(4, 40)[:, :32])
    assert not can(x[:0], weight, one, one, None, bf16)


@pytest.mark.parametrize("per_row", [False, True])
def test_the_library_means_the_same_by_scales(per_row: bool) -> None:
    """A scale per token is a column to it, one per channel a row; the other way round it multiplies wrongly."""
    x, weight, x_scale, weight_scale = operands(4, 32, 64, per_row, per_row)
    out = torch.empty(4, 32, dtype=torch.bfloat16)
    bias = torch.linspace(-1, 1, 32).bfloat16()
    assert gemm_fp8.by_library(x, weight, x_scale, weight_scale, bias, out) is out
    expected = reference.fp8_product(x, weight, x_scale, weight_scale) + bias.float()
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)


def test_on_a_cpu_it_is_always_our_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_fp8, "by_library", None)
    x, weight, x_scale, weight_scale = operands(4, 32, 64)
    found = gemm_fp8.scaled_mm(x, weight, x_scale, weight_scale, out_dtype=torch.float32)
    torch.testing.assert_close(found, reference.fp8_product(x, weight, x_scale, weight_scale), rtol=2e-5, atol=1e-5)
    problem = gemm_fp8.problem(2, 32, 64, torch.float32, "cpu")
    assert problem.key == "gemm_fp8/float32/t16/32x64" and len(problem.candidates) > 1
