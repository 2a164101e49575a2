"""Decode attention in Triton's interpreter, against the definition. R rows, H query heads, D head_dim."""

from __future__ import annotations

import pytest
import reference_attention as reference
import torch

from pageflight.kernels.attention_decode import SplitWorkspace, choose_num_splits, decode_attention

FP32, FP16, FP8 = torch.float32, torch.float16, torch.float8_e4m3fn
TOLERANCE = {FP32: 5e-6, FP16: 2e-3}
CPU = torch.device("cpu")


def check(
    lens: list[int],
    *,
    num_kv_heads: int = 2,
    group: int = 4,
    head_dim: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = FP32,
    cache_dtype: torch.dtype | None = None,
    num_splits: int = 0,
    window: int = 0,
    soft_cap: float = 0.0,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Compare rows with contexts of `lens` keys; the output is NaN before, the workspace too."""
    generator = torch.Generator().manual_seed(len(lens) * 100 + head_dim)
    cache = reference.make_cache(lens, num_kv_heads, head_dim, block_size, cache_dtype or dtype, generator)
    shape = (len(lens), num_kv_heads * group, head_dim)
    queries = torch.randn(shape, generator=generator).to(dtype)
    output = torch.full_like(queries, torch.nan)
    workspace = None
    if num_splits:
        workspace = SplitWorkspace.empty(len(lens) + 1, shape[1], num_splits, head_dim, CPU)
        workspace.outputs_RHPD.fill_(torch.nan)
        workspace.lse_RHP.fill_(torch.nan)
    decode_attention(
        output,
        queries,
        cache.key_blocks,
        cache.value_blocks,
        cache.tables_SM,
        torch.tensor(lens, dtype=torch.int32),
        scale=head_dim**-0.5,
        window=window,
        soft_cap=soft_cap,
        key_scale=key_scale,
        value_scale=value_scale,
        workspace=workspace,
    )
    for row, length in enumerate(lens):
        if length == 0:
            assert not output[row].any(), "a row without a context is zeros"
            continue
        keys, values = cache.context(row, length)
        expected = reference.attention(
            queries[row : row + 1],
            keys * key_scale,
            values * value_scale,
            past_len=length - 1,
            scale=head_dim**-0.5,
            window=window,
            soft_cap=soft_cap,
        )
        bound = TOLERANCE[dtype] * max(1.0, value_scale)
        torch.testing.assert_close(output[row : row + 1].double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("num_splits", [0, 1, 3])
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_every_row_sees_exactly_its_context(dtype: torch.dtype, num_splits: int) -> None:
    """Off by one at a block's border, a row read its neighbour's key: what no row owns is NaN here."""
    check([1, 15, 16, 17, 33, 300], dtype=dtype, num_splits=num_splits)


@pytest.mark.parametrize("num_splits", [0, 2])
def test_rows_of_a_graph_that_hold_no_sequence_become_zeros(num_splits: int) -> None:
    """0 / 0 in a padding row is NaN, and spreads through the next layer's norms into logs and checks."""
    check([0, 5, 0], num_splits=num_splits)


@pytest.mark.parametrize(("num_kv_heads", "group"), [(3, 1), (1, 8), (2, 7), (1, 20)])
def test_query_heads_find_the_kv_head_of_their_group(num_kv_heads: int, group: int) -> None:
    """A group that is no power of two, or larger than a tensor core's tile, wrote into the next group's heads."""
    check([9, 40], num_kv_heads=num_kv_heads, group=group, num_splits=2)


@pytest.mark.parametrize("head_dim", [80, 96, 128, 256])
def test_heads_that_are_no_power_of_two_are_padded(head_dim: int) -> None:
    """The padding of a head is the beginning of the next key."""
    check([70], num_kv_heads=1, group=2, head_dim=head_dim, block_size=32, num_splits=1)


@pytest.mark.parametrize("num_splits", [0, 3])
@pytest.mark.parametrize("window", [1, 7, 100])
def test_a_window_hides_what_is_older(window: int, num_splits: int) -> None:
    """A window smaller than a block, and one that begins in the middle of a tile of keys."""
    check([1, 6, 7, 8, 90, 300], window=window, num_splits=num_splits)


@pytest.mark.parametrize("num_splits", [0, 2])
def test_a_soft_cap_bends_logits_before_the_softmax(num_splits: int) -> None:
    """Computed by powers, tanh overflows beyond 88: here logits reach a hundred times the cap."""
    check([1, 40, 200], soft_cap=0.05, num_splits=num_splits)
    check([40, 200], soft_cap=30.0, num_splits=num_splits)


def test_more_splits_than_keys_are_left_unread() -> None:
    """The join summed parts that no split had written: they are NaN here."""
    check([1, 20, 130, 700], num_kv_heads=1, group=2, num_splits=20)


@pytest.mark.parametrize("num_splits", [0, 2])
def test_an_fp8_cache_is_scaled_back(num_splits: int) -> None:
    """The scale of keys belongs into the logits, that of values behind the sum; one was applied twice."""
    check([3, 70, 200], dtype=FP16, cache_dtype=FP8, key_scale=0.5, value_scale=3.0, num_splits=num_splits)
    check([70], dtype=FP32, cache_dtype=FP8, key_scale=2.0, soft_cap=5.0, num_splits=num_splits)


def test_queries_and_outputs_may_be_parts_of_wider_rows() -> None:
    """Queries are the first heads of a fused product: assumed dense, the second row began in the first one's keys."""
    generator = torch.Generator().manual_seed(0)
    cache = reference.make_cache([5, 30], 1, 32, 16, FP32, generator)
    wide = torch.randn(2, 6, 32, generator=generator)
    untouched = wide[:, 4:].clone()
    output = torch.zeros(2, 3, 64)
    lens = torch.tensor([5, 30], dtype=torch.int64)
    decode_attention(
        output[:, 1:, :32], wide[:, :2], cache.key_blocks, cache.value_blocks, cache.tables_SM, lens, scale=0.2
    )
    dense = torch.empty(2, 2, 32)
    decode_attention(
        dense, wide[:, :2].contiguous(), cache.key_blocks, cache.value_blocks, cache.tables_SM, lens, scale=0.2
    )
    assert output[:, 1:, :32].equal(dense) and not output[:, 0].any() and not output[:, :, 32:].any()
    assert wide[:, 4:].equal(untouched)


def test_a_captured_launch_serves_other_lengths() -> None:
    """Replayed with longer contexts, a grid of the first lengths left their ends out."""
    generator = torch.Generator().manual_seed(1)
    cache = reference.make_cache([400], 1, 32, 16, FP32, generator)
    queries = torch.randn(1, 2, 32, generator=generator)
    workspace = SplitWorkspace.empty(1, 2, 3, 32, CPU)
    lens, output = torch.tensor([400]), torch.empty(1, 2, 32)
    for length in (400, 1, 399, 0, 64):
        lens[0] = length
        decode_attention(
            output, queries, cache.key_blocks, cache.value_blocks, cache.tables_SM, lens, scale=0.2, workspace=workspace
        )
        if length:
            expected = reference.attention(queries, *cache.context(0, length), past_len=length - 1, scale=0.2)
            torch.testing.assert_close(output.double(), expected, rtol=0, atol=5e-6)
        else:
            assert not output.any()


def test_splits_fill_the_machine_but_keep_enough_keys_each() -> None:
    """One sequence on 132 multiprocessors used eight of them; 256 short ones were split for nothing."""
    assert choose_num_splits(1, 8, 32768, 132) == 33
    assert choose_num_splits(256, 8, 32768, 132) == 1
    assert choose_num_splits(1, 8, 1000, 132) == 3
    assert choose_num_splits(1, 8, 100, 132) == 1
    assert choose_num_splits(1, 1, 1 << 20, 132) == 64


def test_a_cache_of_another_layout_is_refused() -> None:
    """K and V with different strides were read with those of K."""
    blocks = torch.zeros(4, 2, 16, 32)
    other = torch.zeros(4, 16, 2, 32).transpose(1, 2)
    output, table = torch.zeros(1, 2, 32), torch.zeros(1, 4, dtype=torch.int32)
    with pytest.raises(AssertionError, match="laid out alike"):
        decode_attention(output, output, blocks, other, table, torch.tensor([1]), scale=1.0)
