"""Copies of whole blocks in Triton's interpreter. L layers, N blocks, n blocks of a call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pageflight.kernels.blocks import copy_blocks, gather_blocks, scatter_blocks, staging_shape

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]


def make_cache(dtype: torch.dtype = torch.float32, head_dim: int = 80) -> Tensor:
    """[L, 2, N, kv heads, block size, D] of random bits, NaN among them."""
    generator = torch.Generator().manual_seed(0)
    elements = (2, 2, 6, 3, 16, head_dim * dtype.itemsize)
    return torch.randint(0, 256, elements, dtype=torch.uint8, generator=generator).view(dtype)


def bits(cache: Tensor) -> Tensor:
    return cache.view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_copy_has_every_bit_in_every_layer(dtype: torch.dtype) -> None:
    """Copied as numbers, NaN lost its payload; of a block longer than a program's share only the beginning came."""
    cache = make_cache(dtype)
    before = bits(cache).clone()
    copy_blocks(cache, torch.tensor([4, 1, 4]), torch.tensor([0, 5, 2]))
    expected = before.clone()
    expected[:, :, [0, 5, 2]] = before[:, :, [4, 1, 4]]
    assert bits(cache).equal(expected)


def test_padding_pairs_copy_nothing() -> None:
    """-1 is the last block to whoever counts from the end."""
    cache = make_cache()
    before = bits(cache).clone()
    copy_blocks(cache, torch.tensor([-1, 3, -1], dtype=torch.int32), torch.tensor([2, -1, -1], dtype=torch.int32))
    assert bits(cache).equal(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_return_from_staging_as_they_went(dtype: torch.dtype) -> None:
    """A swapped sequence came back with the V of another layer."""
    cache = make_cache(dtype)
    before = bits(cache).clone()
    staging = torch.zeros(staging_shape(cache, 4), dtype=torch.uint8).repeat_interleave(dtype.itemsize, -1).view(dtype)
    gather_blocks(staging, cache, torch.tensor([5, 0, 3]))
    for place, block in enumerate([5, 0, 3]):
        assert bits(staging)[place].equal(before[:, :, block])
    assert not bits(staging)[3].any() and bits(cache).equal(before)

    scatter_blocks(cache, staging, torch.tensor([1, -1, 4]))
    expected = before.clone()
    expected[:, :, [1, 4]] = before[:, :, [5, 3]]
    assert bits(cache).equal(expected)


def test_a_staging_buffer_of_another_shape_is_refused() -> None:
    """Words of one model's blocks filled another's."""
    cache = make_cache()
    with pytest.raises(AssertionError):
        gather_blocks(torch.zeros(2, 2, 2, 3, 16, 64), cache, torch.tensor([0]))
    with pytest.raises(AssertionError):
        gather_blocks(torch.zeros(staging_shape(cache, 1)), cache, torch.tensor([0, 1]))
