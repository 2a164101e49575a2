from __future__ import annotations

import pytest
import reference_dense as reference
import torch
from torch import Tensor

from pageflight.kernels import moe, moe_order, tuning
from pageflight.kernels.tuning import Choice, Tiles

SMALL = Tiles(block_t=16, block_n=16, block_k=32)
DTYPES = [torch.float32, torch.float16]


def weights_of(num_experts: int, hidden: int, intermediate: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """gate_up [E, 2I, H] and down [E, H, I]."""
    both = reference.random_rows(num_experts * 2 * intermediate, hidden, torch.float32, seed=1) / hidden**0.5
    down = reference.random_rows(num_experts * hidden, intermediate, torch.float32, seed=2) / intermediate**0.5
    shapes = (num_experts, 2 * intermediate, hidden), (num_experts, hidden, intermediate)
    return both.view(shapes[0]).to(dtype), down.view(shapes[1]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (5, 1), (6, 6), (1, 1)])
@pytest.mark.parametrize("renormalise", [True, False])
def test_routing_is_the_softmax_of_the_greatest(
    num_experts: int, top_k: int, renormalise: bool, dtype: torch.dtype
) -> None:
    logits = reference.random_rows(7, num_experts, dtype) * 3
    weights, experts = moe.route(logits, top_k, renormalise=renormalise)
    expected, chosen = logits.float().softmax(1).topk(top_k)
    expected = expected / expected.sum(1, keepdim=True) if renormalise else expected
    assert torch.equal(experts.long(), chosen)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)


def test_equal_logits_go_to_the_lowest_experts_and_each_expert_at_most_once() -> None:
    """-inf for experts that are switched off: the search for the next one found the same again."""
    weights, experts = moe.route(torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, *[-torch.inf] * 3]]), 2)
    assert experts.tolist() == [[0, 1], [0, 1]]
    assert weights.tolist() == [[0.5, 0.5], [1.0, 0.0]]


def test_a_nan_goes_to_experts_that_exist_and_stays_a_nan() -> None:
    """Compared with anything NaN is false: the expert's number was beyond the last, and other memory was read."""
    logits = torch.zeros(2, 3)
    logits[0, 1] = torch.nan
    weights, experts = moe.route(logits, 2)
    assert bool(weights[0].isnan().all()) and weights[1].tolist() == [0.5, 0.5]
    assert int(experts.min()) >= 0 and int(experts.max()) < 3


@pytest.mark.parametrize("kind", ["random", "one expert gets all", "descending"])
@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts", "block"), [(1, 1, 4, 16), (40, 2, 5, 16), (9, 3, 8, 4)])
def test_every_slot_has_one_place_in_a_tile_of_its_expert(
    kind: str, num_tokens: int, top_k: int, num_experts: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts without tokens take no tile, and the last tile of one is filled up before the next begins."""
    monkeypatch.setattr(moe_order, "_TILE", 16)  # several tiles of the search
    generator = torch.Generator().manual_seed(0)
    experts = torch.randint(0, num_experts, (num_tokens, top_k), generator=generator, dtype=torch.int32)
    if kind == "one expert gets all":
        experts[:] = num_experts - 2
    if kind == "descending":
        experts = experts.flatten().sort(descending=True).values.view(num_tokens, top_k).contiguous()
    num_slots = experts.numel()
    order = moe_order.Order.empty(num_slots, num_experts, block, "cpu")
    order.slots.fill_(-7)
    order.tile_experts.fill_(-7)
    assert moe.order_by_expert(experts, num_experts, block, out=order) is order
    tiles = order.slots.view(-1, block)
    assert set(order.tile_experts.tolist()) <= {-1, *range(num_experts)}
    owners = [expert for expert in order.tile_experts.tolist() if expert >= 0]
    assert owners == sorted(owners) and bool((order.tile_experts[len(owners) :] == -1).all())
    placed: list[int] = []
    for tile, expert in zip(tiles[: len(owners)].tolist(), owners, strict=True):
        here = [slot for slot in tile if slot < num_slots]
        assert here and all(int(experts.flatten()[slot]) == expert for slot in here)
        assert all(slot == num_slots for slot in tile[len(here) :])
        placed += here
    assert sorted(placed) == list(range(num_slots))
    assert order.counts.tolist() == torch.bincount(experts.flatten(), minlength=num_experts).tolist()


def test_there_is_room_for_the_worst_division_into_tiles() -> None:
    """One slot of each expert fills a tile each; the bound must hold for any counts, without asking the device."""
    for num_slots, num_experts, block in [(1, 8, 16), (8, 8, 16), (9, 8, 16), (40, 3, 16), (1000, 8, 64)]:
        used = min(num_slots, num_experts)
        worst = [1] * (used - 1) + [num_slots - used + 1]
        assert sum(-(-count // block) for count in worst) <= moe.max_tiles(num_slots, num_experts, block)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(1, 4, 2), (21, 3, 1), (19, 5, 3)])
def test_the_layer_equals_its_experts_one_by_one(
    num_tokens: int, num_experts: int, top_k: int, dtype: torch.dtype
) -> None:
    """Features that are no multiple of a tile, experts with no token, and more slots than one tile has."""
    hidden, intermediate = 40, 24
    x, logits = reference.random_rows(num_tokens, hidden, dtype), reference.random_rows(num_tokens, num_experts, dtype)
    gate_up, down = weights_of(num_experts, hidden, intermediate, dtype)
    found = moe.mixture(x, logits, gate_up, down, top_k, tiles=SMALL)
    expected = reference.mixture(x, logits, gate_up, down, top_k)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-3
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


def test_one_expert_gets_all_tokens() -> None:
    x, logits = reference.random_rows(35, 16, torch.float32), torch.zeros(35, 4)
    logits[:, 2] = 5.0
    gate_up, down = weights_of(4, 16, 16, torch.float32)
    out = torch.full((35, 20), 9.0)
    moe.mixture(x, logits, gate_up, down, 1, out=out[:, :16], tiles=SMALL)
    torch.testing.assert_close(out[:, :16], reference.mixture(x, logits, gate_up, down, 1), rtol=1e-5, atol=1e-5)
    assert bool((out[:, 16:] == 9).all())


def test_a_token_gets_the_same_in_any_company() -> None:
    """Its place in a tile changes with the others; its sums must not."""
    gate_up, down = weights_of(4, 32, 16, torch.float32)
    x, logits = reference.random_rows(23, 32, torch.float32), reference.random_rows(23, 4, torch.float32, seed=5)
    together = moe.mixture(x, logits, gate_up, down, 2, tiles=SMALL)
    alone = moe.mixture(x[9:10], logits[9:10], gate_up, down, 2, tiles=SMALL)
    assert torch.equal(together[9:10], alone)


def test_fp8_experts_with_scales_per_channel_and_token() -> None:
    num_experts, hidden, intermediate = 3, 32, 32
    gate_up, down = weights_of(num_experts, hidden, intermediate, torch.float32)
    scales = [weight.abs().amax(2) / reference.FP8_MAX for weight in (gate_up, down)]
    packed = [
        reference.to_fp8(weight, scale[:, :, None]) for weight, scale in zip((gate_up, down), scales, strict=True)
    ]
    x, logits = reference.random_rows(9, hidden, torch.float32), reference.random_rows(9, num_experts, torch.float32)
    found = moe.mixture(
        x, logits, packed[0], packed[1], 2, gate_up_scales=scales[0], down_scales=scales[1], tiles=SMALL
    )
    widened = [values.float() * scale[:, :, None] for values, scale in zip(packed, scales, strict=True)]
    expected = reference.mixture(x, logits, widened[0], widened[1], 2)
    error = (found - expected).norm() / expected.norm()
    assert float(error) < 0.05, "activations of three bits of fraction are off by a few percent, not more"


def test_no_tokens_are_no_launch() -> None:
    """A grid of nothing is an error of CUDA."""
    gate_up, down = weights_of(2, 16, 16, torch.float32)
    assert moe.mixture(torch.empty(0, 16), torch.empty(0, 2), gate_up, down, 2).shape == (0, 16)


@pytest.mark.parametrize("num_slots", [2, 200, 100_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_default_tiles_fit_the_hardware(num_slots: int, dtype: torch.dtype) -> None:
    """Shared memory of the smallest card of 8.9 (99 KiB) holds the tiles of all stages but the last."""
    tiles = moe.default_tiles(num_slots, 8, dtype)
    assert (tiles.block_t + tiles.block_n) * tiles.block_k * dtype.itemsize * (tiles.num_stages - 1) <= 99 * 1024


def test_what_is_measured_is_what_will_be_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that is made differently in two places stores choices that nobody finds."""
    asked: list[str] = []

    class Nothing(dict[str, Choice]):
        def get(self, key: str, default: object = None) -> None:  # type: ignore[override]
            asked.append(key)

    monkeypatch.setattr(tuning, "stored", lambda device: Nothing())
    problem = moe.problem(3, 4, 2, 16, 16, torch.float32, "cpu")
    problem.launch(None)
    assert asked == [problem.key] == ["moe/float32/t16/2x4x32x16"]
    assert all(tiles is not None and tiles.block_k >= 16 for tiles in problem.candidates)
