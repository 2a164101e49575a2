"""TensorRT networks of several ranks: walked in torch, with real sums between them, they are the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import tensorrt_rtx as trt

from pageflight.lowering.engine_dir import open_engine
from pageflight.lowering.tensorrt_ranks import RankTensors
from pageflight.lowering.torch_lowering import TorchLowering
from pageflight.models.sharding import Shard

from .conftest import Driver, Workshop
from .test_sharding import difference
from .thread_ranks import ThreadedRanks
from .walked_model import WalkedModel

FP32_TOLERANCE = 1e-4
SHAPES = {"gqa": (2, 4), "mha": (2, 4), "mqa": (4,), "tied": (2,), "biases": (4,), "odd-sizes": (5,), "one-layer": (2,)}
"""With a K/V head of each rank's own, one that ranks hold twice, uneven MLPs and vocabularies."""


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


@pytest.mark.parametrize("form", ["between", "inside", "constant"])
@pytest.mark.parametrize(("shape", "size"), [(shape, size) for shape, sizes in SHAPES.items() for size in sizes])
def test_ranks_have_the_logits_and_the_greedy_text_of_one(workshop, random_ids, shape, size, form):
    """A residual added on every rank, a bias as often as there are ranks, a norm of a part of the sum, rows that sample
    taken on one side of a sum only: all of it is text."""
    whole = workshop.driver(shape, "torch")
    options = {"constant": True} if form == "constant" else {"collectives": form}
    with ranks(workshop, shape, size, **options) as parts:
        steps = [({"a": random_ids(40, 1), "b": random_ids(7, 2)}, None), ({"a": random_ids(30, 3), "b": [5]}, {"b"})]
        for new, samples in [*steps, ({"a": random_ids(3, 4)}, set()), ({"b": [6], "a": [7]}, None)]:
            expected, found = whole.step(new, samples), parts.step(new, samples)
            assert expected.keys() == found.keys()
            if found:
                assert difference(expected, found) <= FP32_TOLERANCE
        for driver in (whole, parts):
            driver.fork("a", "c")
            for _ in range(3):
                driver.step({"c": [int(driver.step({"a": [3]})["a"].argmax())]})
        assert whole.tokens["c"] == parts.tokens["c"]
