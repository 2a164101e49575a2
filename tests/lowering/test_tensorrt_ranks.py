"""TensorRT networks of several ranks: walked in torch, with real sums between them, they are the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import tensorrt_rtx as trt

from pageflight.lowering.engine_dir import open_engine
from pageflight.lowering.tensorrt_build import build_engines, build_network, lower, rank_part
from pageflight.lowering.tensorrt_lowering import TensorRtLowering
from pageflight.lowering.tensorrt_plan import EnginePlan, profiles
from pageflight.lowering.tensorrt_ranks import RankTensors
from pageflight.lowering.tensorrt_target import TensorRtTarget
from pageflight.lowering.torch_lowering import TorchLowering
from pageflight.models.sharding import Shard
from pageflight.quant.sharding import ShardStore, input_unit

from .conftest import Driver, Workshop
from .test_sharding import check_same, difference
from .thread_ranks import ThreadedRanks
from .walked_model import WalkedModel

FP32_TOLERANCE = 1e-4
SHAPES = {"gqa": (2, 4), "mha": (4,), "mqa": (4,), "tied": (2,), "biases": (4,), "odd-sizes": (5,), "one-layer": (2,)}
"""With a K/V head of each rank's own, one that ranks hold twice, uneven MLPs and vocabularies."""
CASES = [(shape, size, "between") for shape, sizes in SHAPES.items() for size in sizes]
CASES += [(shape, size, "inside") for shape, size in (("gqa", 2), ("biases", 4), ("odd-sizes", 5), ("one-layer", 2))]
CASES += [("biases", 2, "constant"), ("odd-sizes", 5, "constant"), ("tied", 4, "constant")]


@contextmanager
def ranks(
    workshop: Workshop, shape: str, size: int, dtype: str = "fp32", group_size: int = 0, scale=None, **form
) -> Iterator[Driver]:
    folder = workshop.engine(shape, TorchLowering(), dtype, "fp32", group_size, scale)

    def load(communicator) -> WalkedModel:
        engine = open_engine(folder, "torch")
        return WalkedModel(trt, engine, activations="fp32", communicator=communicator, **form)

    model = ThreadedRanks(folder, size, load_rank=load)
    driver = Driver(model)
    model.allocate(driver.num_blocks)
    yield driver
    model.close()


@pytest.mark.parametrize(("shape", "size", "form"), CASES)
def test_ranks_have_the_logits_and_the_greedy_text_of_one(workshop, random_ids, shape, size, form):
    """A residual added on every rank, a bias as often as there are ranks, a norm of a part of the sum, rows that sample
    taken on one side of a sum only: all of it is text."""
    whole = workshop.driver(shape, "torch")
    options = {"constant": True} if form == "constant" else {"collectives": form}
    with ranks(workshop, shape, size, **options) as parts:
        check_same(whole, parts, random_ids)


@pytest.mark.parametrize(
    ("dtype", "group_size", "scale"),
    [("int8", 0, None), ("int8", 32, None), ("int8", 0, 0.03125), ("int4", 64, None), ("int4", 0, None)],
)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_of_a_quantised_model_have_its_logits(workshop, random_ids, size, dtype, group_size, scale):
    """Scales cut at the wrong group; four ranks cut through the groups of 64. What is rounded by a calibrated scale may
    fall to the other side of a border after a sum in another order."""
    new = {name: random_ids(30, seed) for seed, name in enumerate("abcd")}
    whole = workshop.driver("quantisable", "torch", dtype, group_size=group_size, input_scale=scale).step(new)
    with ranks(workshop, "quantisable", size, dtype, group_size, scale) as parts:
        found = parts.step(new)
    if scale is None:
        assert difference(whole, found) <= FP32_TOLERANCE
    else:
        assert error(found, whole) <= 0.06


@pytest.mark.parametrize(("size", "scale"), [(4, 0.03125), (2, None)])
def test_ranks_of_an_fp8_model_are_as_near_to_the_exact_one(workshop, random_ids, size, scale):
    """Without calibrated scales a rank rounds activations by the peak of its own inputs: as fine, not the same."""
    new = {name: random_ids(30, seed) for seed, name in enumerate("abcd")}
    exact = workshop.driver("quantisable", "torch").step(new)
    whole = workshop.driver("quantisable", "torch", "fp8", input_scale=scale).step(new)
    with ranks(workshop, "quantisable", size, "fp8", 0, scale) as parts:
        assert 0 < error(parts.step(new), exact) <= 1.25 * error(whole, exact)


def error(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    wanted = np.stack(list(expected.values()))
    return float(np.sqrt(np.mean((np.stack(list(found.values())) - wanted) ** 2)) / wanted.std())


def test_a_layer_takes_two_sums_and_a_pass_two_words_more(workshop, random_ids):
    """Whatever else is told is waited for."""
    for collectives in ("between", "inside"):
        with ranks(workshop, "gqa", 2, collectives=collectives) as parts:
            parts.step({"a": random_ids(9)})
            assert parts.model.group.num_calls == 2 * 3 + 2


@pytest.mark.parametrize(
    ("shape", "dtype", "group_size", "size"),
    [
        ("odd-sizes", "fp32", 0, 5),
        ("quantisable", "fp8", 0, 4),
        ("quantisable", "int8", 32, 4),
        ("quantisable", "int4", 64, 4),
        ("biases", "bf16", 0, 2),
        ("tied", "int8", 0, 2),
    ],
)
def test_a_rank_is_lowered_for_what_it_then_reads(workshop, shape, dtype, group_size, size):
    """Forms are computed from the cuts, without a look at the weights: an engine for other sizes reads beyond them. All
    ranks have as many rows of the vocabulary, and what none has is zeros."""
    engine = open_engine(workshop.engine(shape, TorchLowering(), dtype, "fp32", group_size), "torch")
    num_rows = 0
    for rank in range(size):
        split = engine.split(Shard(rank=rank, size=size))
        tensors, parts = RankTensors(engine.weights, split), ShardStore(engine.weights, split)
        for name, form in tensors.forms.items():
            for stored, (_, wanted) in form.tensors(name).items():
                assert tensors.tensor(stored).shape == wanted, (rank, stored)
        table, own = tensors.tensor("embed"), parts["embed"].values
        assert (table[: len(own)] == own).all() and not table[len(own) :].any()
        num_rows += len(own)
    assert num_rows == engine.config.vocab_size


@pytest.mark.parametrize(
    ("dtype", "group_size", "collectives"),
    [
        *(("fp32", 0, "between"), ("fp16", 0, "between"), ("fp8", 0, "between"), ("int8", 0, "between")),
        *(("int4", 64, "between"), ("fp32", 0, "inside"), ("bf16", 0, "inside"), ("fp8", 0, "inside")),
    ],
)
def test_the_segments_of_a_rank_build_in_every_precision(workshop, dtype, group_size, collectives):
    """A layer that the network takes is not a layer that the builder can build: sums over ranks are, and without a GPU.
    Four ranks have groups of int4 that are smaller than the model's."""
    engine = open_engine(workshop.engine("quantisable", TorchLowering(), dtype, "fp32", group_size), "torch")
    target = TensorRtTarget(compute_capabilities=(89,), tensor_parallel=4, collectives=collectives)
    unit = input_unit(dtype, group_size)
    tensors, config, joint = rank_part(engine.weights, engine.config, 1, unit, target)
    activations = TensorRtLowering().activations(dtype)
    made = lower(trt, config, tensors.forms, activations=activations, num_positions=512, joint=joint)
    for name in made.segments:
        assert len(build_network(trt, made, name, target, profiles(4, 16))) > 10_000


def built(workshop, folder, shape, size, **form) -> EnginePlan:
    engine = open_engine(workshop.engine(shape, TorchLowering(), "bf16", "native"), "torch")
    target = TensorRtTarget(compute_capabilities=(89,), max_num_seqs=2, max_num_tokens=8, tensor_parallel=size, **form)
    seen = []
    build_engines(
        folder,
        engine.config,
        engine.weights,
        target,
        activations="bf16",
        num_positions=64,
        input_unit=1,
        advance=lambda done, total: seen.append((done, total)),
    )
    assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1)), "progress that jumps"
    return EnginePlan.read(folder)


def test_ranks_of_equal_sizes_share_their_engines(workshop, tmp_path):
    """Eight ranks built the same engines eight times. Where the MLP does not divide, only its segments are two."""
    (tmp_path / "even").mkdir()
    plan = built(workshop, tmp_path / "even", "gqa", 2)
    assert [segment.name for segment in plan.segments] == [
        *("embed", "first", "output", "mlp", "mid", "last_output", "last_mlp", "last")
    ]
    assert {segment.ranks for segment in plan.segments} == {(0, 1)} and plan.tensor_parallel == 2
    (tmp_path / "uneven").mkdir()
    plan = built(workshop, tmp_path / "uneven", "odd-sizes", 5)
    files = {segment.file: segment.ranks for segment in plan.segments if len(segment.ranks) < 5}
    assert files == {
        f"segments/{name}{of}.engine": ranks
        for name in ("mlp", "last_mlp")
        for of, ranks in (("", (0,)), (".rank1", (1, 2, 3, 4)))
    }
    assert [item.file for item in plan.of_rank(4).segments if item.name == "mlp"] == ["segments/mlp.rank1.engine"]


def test_ranks_whose_weights_are_constants_have_engines_of_their_own(workshop, tmp_path):
    """Rank 1 computed with the weights of rank 0."""
    plan = built(workshop, tmp_path, "two-layers", 2, weights="constant", collectives="inside")
    assert plan.collectives == "inside" and not any(run.summed for run in plan.runs)
    assert [(segment.file, segment.ranks) for segment in plan.segments] == [
        (f"segments/{name}{of}.engine", (rank,))
        for rank, of in ((0, ""), (1, ".rank1"))
        for name in ("first", "mid1", "last")
    ]
    first, other = ((tmp_path / f"segments/mid1{of}.engine").read_bytes() for of in ("", ".rank1"))
    assert first != other
