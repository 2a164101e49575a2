"""Mixed attention in Triton's interpreter, against the definition. S sequences, T packed tokens, D head_dim."""

from __future__ import annotations

from itertools import pairwise

import pytest
import reference_attention as reference
import torch

from pageflight.kernels.attention_decode import SplitWorkspace, decode_attention
from pageflight.kernels.attention_mixed import mixed_attention, rows_per_tile
from pageflight.kernels.attention_tile import NO_WINDOW

FP32, FP16, FP8 = torch.float32, torch.float16, torch.float8_e4m3fn
TOLERANCE = {FP32: 5e-6, FP16: 3e-3}


def check(
    query_lens: list[int],
    past_lens: list[int],
    *,
    num_kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = FP32,
    cache_dtype: torch.dtype | None = None,
    num_padding: int = 0,
    max_query_len: int | None = None,
    window: int = 0,
    soft_cap: float = 0.0,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    most_keys: int = 0,
) -> None:
    """Compare every sequence; the output is NaN before, and so are the queries of padding tokens."""
    generator = torch.Generator().manual_seed(sum(past_lens) + head_dim)
    lens = [query_len + past_len for query_len, past_len in zip(query_lens, past_lens, strict=True)]
    cache = reference.make_cache(lens, num_kv_heads, head_dim, block_size, cache_dtype or dtype, generator)
    begins = [sum(query_lens[:s]) for s in range(len(lens) + 1)]
    queries = torch.full((begins[-1] + num_padding, num_kv_heads * group, head_dim), torch.nan, dtype=dtype)
    queries[: begins[-1]] = torch.randn((begins[-1], *queries.shape[1:]), generator=generator)
    output = torch.full_like(queries, torch.nan)
    mixed_attention(
        output,
        queries,
        cache.key_blocks,
        cache.value_blocks,
        cache.tables_SM,
        torch.tensor(begins, dtype=torch.int32),
        torch.tensor(past_lens, dtype=torch.int32),
        max_query_len=max_query_len or max(query_lens),
        scale=head_dim**-0.5,
        window=window,
        soft_cap=soft_cap,
        key_scale=key_scale,
        value_scale=value_scale,
        most_keys=most_keys or NO_WINDOW,
    )
    if most_keys:
        are_long = [
            length == 1 and past_len >= most_keys for length, past_len in zip(query_lens, past_lens, strict=True)
        ]
        left = [begin for begin, is_long in zip(begins, are_long, strict=False) if is_long]
        assert left and bool(output[left].isnan().all()) and not bool(output[: begins[-1]].isnan().all())
        decode_attention(
            output,
            queries,
            cache.key_blocks,
            cache.value_blocks,
            cache.tables_SM,
            torch.tensor([length * is_long for length, is_long in zip(lens, are_long, strict=True)], dtype=torch.int32),
            scale=head_dim**-0.5,
            window=window,
            soft_cap=soft_cap,
            workspace=SplitWorkspace.empty(len(lens) + 2, num_kv_heads * group, 3, head_dim, torch.device("cpu")),
            tokens_R=torch.tensor(begins[:-1], dtype=torch.int32),
        )
    for sequence, (begin, end) in enumerate(pairwise(begins)):
        keys, values = cache.context(sequence, lens[sequence])
        expected = reference.attention(
            queries[begin:end],
            keys * key_scale,
            values * value_scale,
            past_len=past_lens[sequence],
            scale=head_dim**-0.5,
            window=window,
            soft_cap=soft_cap,
        )
        bound = TOLERANCE[dtype] * max(1.0, value_scale)
        torch.testing.assert_close(output[begin:end].double(), expected, rtol=0, atol=bound)
    assert not output[begins[-1] :].any(), "padding tokens get zeros"


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_chunks_and_decode_tokens_share_a_launch(dtype: torch.dtype) -> None:
    """A chunk that ended in the middle of a tile took the first queries of the next sequence along."""
    check([1, 17, 1, 40, 3], [32, 0, 99, 15, 200], dtype=dtype)


def test_a_chunk_sees_its_past_and_itself_up_to_each_token() -> None:
    """With a prefix in the cache the diagonal moves: a mask from the chunk's beginning hid the whole past."""
    check([33], [0])
    check([16], [16])
    check([5], [150])


@pytest.mark.parametrize("query_lens", [[1], [0, 7, 0, 0, 9, 0], [1] * 20], ids=str)
def test_tiles_find_their_sequence(query_lens: list[int]) -> None:
    """Bisection over sequences without tokens ended at a neighbour's."""
    check(query_lens, [3 * index for index in range(len(query_lens))])


@pytest.mark.parametrize("num_padding", [1, 5, 50])
def test_tokens_behind_the_last_sequence_are_zeros(num_padding: int) -> None:
    """A batch filled up to a graph's size left NaN in its last rows."""
    check([4, 13], [0, 20], num_padding=num_padding)


@pytest.mark.parametrize(("num_kv_heads", "group"), [(2, 1), (1, 3), (1, 7), (1, 8), (1, 20)])
def test_groups_of_any_size_share_a_tile(num_kv_heads: int, group: int) -> None:
    """Rows that a group leaves over in a tile are no queries."""
    check([9, 1, 26], [0, 40, 3], num_kv_heads=num_kv_heads, group=group)


@pytest.mark.parametrize("head_dim", [80, 96])
def test_heads_that_are_no_power_of_two_are_padded(head_dim: int) -> None:
    """The padding of a head is the beginning of the next key."""
    check([20], [30], num_kv_heads=1, head_dim=head_dim, block_size=32)


@pytest.mark.parametrize("window", [1, 5, 64, 70])
def test_a_window_moves_with_each_query(window: int) -> None:
    """Taken from the tile's last query, a window hid keys that its first one sees."""
    check([30, 1, 3], [100, 90, 0], window=window)


def test_a_soft_cap_bends_logits_before_the_softmax() -> None:
    """Applied behind the mask, the cap made -inf into -cap: tokens saw their future."""
    check([20, 1], [10, 60], soft_cap=2.0)


def test_an_fp8_cache_is_scaled_back() -> None:
    """Keys scaled twice are logits squared in their scale."""
    check([20, 1], [10, 60], dtype=FP16, cache_dtype=FP8, key_scale=0.5, value_scale=3.0)


def test_the_bound_of_query_lengths_only_chooses_the_tile() -> None:
    """A bound that was too low would have cut chunks off."""
    for max_query_len in (1, 8, 1000):
        check([25, 2], [7, 0], dtype=FP16, max_query_len=max_query_len)


def test_tiles_hold_a_group_and_fit_into_registers() -> None:
    """128 rows of heads of 256 keep their sums in memory instead of registers."""
    assert rows_per_tile(4, 1, 128, 2) == 16
    assert rows_per_tile(4, 5, 128, 2) == 32
    assert rows_per_tile(4, 500, 128, 2) == 128
    assert rows_per_tile(2, 500, 256, 2) == 64
    assert rows_per_tile(20, 1, 128, 2) == 32
    assert rows_per_tile(4, 500, 128, 4) == 16


def test_one_token_gets_what_decode_attention_gives_it() -> None:
    """Two kernels for the same thing drift apart."""
    generator = torch.Generator().manual_seed(3)
    lens = [1, 30, 129]
    cache = reference.make_cache(lens, 2, 32, 16, FP32, generator)
    queries = torch.randn(3, 4, 32, generator=generator)
    mixed, decoded = torch.empty_like(queries), torch.empty_like(queries)
    blocks = (cache.key_blocks, cache.value_blocks, cache.tables_SM)
    decode_attention(decoded, queries, *blocks, torch.tensor(lens), scale=0.2, window=50)
    past_lens = torch.tensor(lens) - 1
    mixed_attention(mixed, queries, *blocks, torch.arange(4), past_lens, max_query_len=1, scale=0.2, window=50)
    torch.testing.assert_close(mixed, decoded, rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", [0, 40])
def test_rows_that_decode_behind_long_contexts_are_split_by_the_other_kernel(window: int) -> None:
    """Each was one program that read all of its context while the chunks had long been done. Neither kernel may touch
    what is the other's, and nobody's is left out: a chunk of one token, a row with exactly as many keys, padding."""
    query_lens, past_lens = [1, 20, 1, 1, 3, 1], [90, 100, 63, 64, 70, 0]
    check(query_lens, past_lens, most_keys=64, window=window, num_padding=2)
