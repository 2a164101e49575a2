"""Rope and the write of K and V in Triton's interpreter. T tokens, D head_dim."""

from __future__ import annotations

import numpy as np
import pytest
import reference_attention as reference
import torch
from torch import Tensor

from pageflight.kernels.attention_decode import decode_attention
from pageflight.kernels.attention_mixed import mixed_attention
from pageflight.kernels.kv_write import FP8_MAX, rope_and_write
from pageflight.models.config import DecoderConfig, RopeConfig
from pageflight.models.rope import rope_tables

FP32, FP16, FP8 = torch.float32, torch.float16, torch.float8_e4m3fn
STALE = 7.0


def tables(head_dim: int) -> tuple[Tensor, Tensor]:
    config = DecoderConfig(
        family="llama",
        vocab_size=8,
        hidden_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=head_dim,
        intermediate_size=8,
        max_positions=64,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
    )
    cosines, sines = (torch.from_numpy(np.ascontiguousarray(table)) for table in rope_tables(config, 64))
    return cosines, sines


def turned(heads_THD: Tensor, cosines_TD: Tensor, sines_TD: Tensor) -> Tensor:
    """Rope as `lowering.torch_ops` computes it, in float64."""
    heads = heads_THD.double()
    first, second = heads.chunk(2, 2)
    return heads * cosines_TD[:, None].double() + torch.cat([-second, first], 2) * sines_TD[:, None].double()


@pytest.mark.parametrize("cache_dtype", [FP32, FP16], ids=str)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"), [(4, 2, 32, 16), (14, 2, 64, 32), (3, 3, 80, 16)]
)
def test_queries_are_turned_and_keys_and_values_lie_in_their_cells(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, cache_dtype: torch.dtype
) -> None:
    """A value was turned like a key; a key landed in the block of the token before; a padding row wrote to block 0."""
    generator = torch.Generator().manual_seed(head_dim)
    positions = torch.tensor([0, 15, 16, 63, 0, 5])
    slots = torch.tensor([3 * block_size, 0, 2 * block_size - 1, 2 * block_size + 5, -1, 7], dtype=torch.int32)
    dtype = FP32 if cache_dtype == FP32 else FP16
    qkv = torch.randn(6, (num_heads + 2 * num_kv_heads) * head_dim, generator=generator).to(dtype)
    cosines, sines = tables(head_dim)
    cache = torch.full((2, 4, num_kv_heads, block_size, head_dim), STALE).to(cache_dtype)
    queries = torch.full((6, num_heads, head_dim), STALE, dtype=dtype)
    rope_and_write(queries, cache[0], cache[1], qkv, cosines, sines, positions, slots)

    heads = qkv.view(6, -1, head_dim)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], 1)
    rows = cosines[positions], sines[positions]
    bound = 1e-6 if dtype == FP32 else 3e-3
    expected = turned(q, *rows)
    real = slots >= 0
    torch.testing.assert_close(queries[real].double(), expected[real], rtol=0, atol=bound)
    assert (queries[~real] == STALE).all(), "padding writes nothing"
    expected_cache = torch.full_like(cache, STALE).double()
    for token in torch.nonzero(real)[:, 0].tolist():
        block, place = divmod(int(slots[token]), block_size)
        expected_cache[0, block, :, place] = turned(k, *rows)[token]
        expected_cache[1, block, :, place] = v[token].double()
    torch.testing.assert_close(cache.double(), expected_cache, rtol=0, atol=bound)
    if cache_dtype == dtype:
        assert cache[1, 0, :, 0].equal(v[1]), "values keep their bits"


def test_an_fp8_cache_holds_what_is_divided_by_the_scale() -> None:
    """Keys and values have scales of their own; beyond 448 e4m3 has nothing but NaN.

    The interpreter rounds to e4m3 wrongly (127 becomes 64), so everything here is a number of e4m3 at position 0, where
    nothing is turned. Rounding is the GPU's own instruction: test_compile looks for it.
    """
    generator = torch.Generator().manual_seed(0)
    key_scale, value_scale = 0.25, 2.0
    shape, scales = (2, 2, 32), torch.tensor([key_scale, value_scale])[None, :, None]
    signs = 2.0 * torch.randint(0, 2, shape, generator=generator) - 1.0
    stored = signs * torch.randint(8, 16, shape, generator=generator) * torch.tensor([0.0625, 16.0])[:, None, None]
    stored[0, 1, :2] = torch.tensor([1e6, -1e6])
    qkv = torch.cat([torch.randn(2, 64, generator=generator), (stored * scales).flatten(1)], 1)
    cosines, sines = tables(32)
    cache, queries = torch.zeros(2, 2, 1, 16, 32).to(FP8), torch.empty(2, 2, 32)
    rope_and_write(
        queries,
        cache[0],
        cache[1],
        qkv,
        cosines,
        sines,
        torch.tensor([0, 0]),
        torch.tensor([17, 2]),
        key_scale=key_scale,
        value_scale=value_scale,
    )
    expected = stored.clamp(-FP8_MAX, FP8_MAX)
    assert expected.to(FP8).float().equal(expected), "numbers of e4m3"
    for token, (block, place) in enumerate([(1, 1), (0, 2)]):
        assert cache[:, block, 0, place].float().equal(expected[token])
    assert queries.flatten(1).equal(qkv[:, :64]), "queries keep their scale"


def test_queries_may_be_turned_in_place() -> None:
    """The second half of a head was turned with the first one's new values."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 4 * 32, generator=generator)
    cosines, sines = tables(32)
    cache, positions, slots = torch.zeros(2, 1, 1, 16, 32), torch.tensor([1, 2, 3]), torch.tensor([0, 1, 2])
    apart = torch.empty(3, 2, 32)
    rope_and_write(apart, cache[0], cache[1], qkv, cosines, sines, positions, slots)
    first, keys = cache.clone(), qkv[:, 64:].clone()
    rope_and_write(qkv.view(3, 4, 32)[:, :2], cache[0], cache[1], qkv, cosines, sines, positions, slots)
    assert qkv.view(3, 4, 32)[:, :2].equal(apart) and qkv[:, 64:].equal(keys) and cache.equal(first)


def test_a_context_written_in_pieces_is_attended_whole() -> None:
    """Slots counted blocks in another order than block tables did, and each kernel was right by itself."""
    generator = torch.Generator().manual_seed(5)
    pieces, block_size, table = [20, 13, 1], 16, torch.tensor([[4, 1, 2]], dtype=torch.int32)
    length = sum(pieces)
    qkv, (cosines, sines) = torch.randn(length, 4 * 32, generator=generator), tables(32)
    cache = torch.full((2, 5, 1, block_size, 32), torch.nan)
    queries, output = torch.empty(length, 2, 32), torch.empty(length, 2, 32)
    begin = 0
    for count in pieces:
        new, positions = slice(begin, begin + count), torch.arange(begin, begin + count)
        slots = table[0, positions // block_size] * block_size + positions % block_size
        rope_and_write(queries[new], cache[0], cache[1], qkv[new], cosines, sines, positions, slots)
        arguments = (output[new], queries[new], cache[0], cache[1], table)
        if count == 1:
            decode_attention(*arguments, torch.tensor([begin + 1]), scale=0.2)
        else:
            past_lens, begins = torch.tensor([begin]), torch.tensor([0, count])
            mixed_attention(*arguments, begins, past_lens, max_query_len=count, scale=0.2)
        begin += count
    q, k, v = qkv.view(length, 4, 32).split([2, 1, 1], 1)
    turned_q, turned_k = (turned(part, cosines[:length], sines[:length]) for part in (q, k))
    expected = reference.attention(turned_q, turned_k, v.double(), past_len=0, scale=0.2)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=5e-6)
