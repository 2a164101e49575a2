"""Segments with our attention between them, as on a GPU: TensorRT's part walked in torch, ours interpreted."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import tensorrt_rtx as trt
import torch
from perf.gpu_check.network_walk import WalkedSegments

from pageflight.core.errors import ConfigError
from pageflight.lowering import tensorrt_model
from pageflight.lowering.device_model import KernelModel
from pageflight.lowering.engine_dir import open_engine
from pageflight.lowering.tensorrt_model import SegmentModel, load_segments
from pageflight.lowering.tensorrt_plan import EnginePlan, profiles
from pageflight.lowering.torch_lowering import TorchLowering

from .conftest import Driver
from .test_device_model import HostDriven
from .walked_model import WalkedModel


class NotedSegments(WalkedSegments):
    """Notes which profiles are asked for."""

    def __init__(self, walked: WalkedModel) -> None:
        super().__init__(walked.walks, walked.segments)
        self.profiles: list[int] = []
        self.saved = 0
        self.fault: Exception | None = None
        """What decode steps raise."""

    def run(self, segment: str, profile: int, inputs: Mapping[str, torch.Tensor], outputs: Mapping) -> None:
        self.profiles.append(profile)
        if self.fault and profile == 0:
            raise self.fault
        super().run(segment, profile, inputs, outputs)

    def can_capture(self, stream: int) -> bool:
        return stream != 3

    def save(self) -> None:
        self.saved += 1


def segment_driver(workshop, shape, dtype="fp32", group_size=0):
    folder = workshop.engine(shape, TorchLowering(), dtype, "fp32", group_size)
    engine = open_engine(folder, "torch")
    walked = WalkedModel(trt, engine, activations="fp32")
    plan = EnginePlan(
        flavor="rtx",
        compute_capabilities=(),
        activations="fp32",
        weights="input",
        profiles=profiles(4, 128),
        segments=tuple(walked.segments.values()),
        runs=walked.runs,
    )
    segments = NotedSegments(walked)
    model = SegmentModel(engine, plan, segments, torch.device("cpu"))
    driver = Driver(HostDriven(model))
    model.blocks.allocate(driver.num_blocks)
    return driver, segments


@pytest.mark.parametrize(("shape", "dtype", "group_size"), [("gqa", "fp32", 0), ("quantisable", "int4", 64)])
def test_segments_and_attention_give_the_references_logits(workshop, random_ids, shape, dtype, group_size):
    """The residual in the wrong buffer, another layer's weights, keys turned twice: each gives plausible numbers."""
    driver, segments = segment_driver(workshop, shape, dtype, group_size)
    reference = workshop.driver(shape, "torch", dtype=dtype, group_size=group_size)
    for new in (
        {"a": random_ids(37, 1), "b": random_ids(3, 2)},
        {"a": [7], "b": random_ids(30, 3)},
        {"a": [8], "b": [9]},
    ):
        expected, found = reference.step(new), driver.step(new)
        assert max(np.abs(expected[name] - found[name]).max() for name in expected) < 1e-4
    assert set(segments.profiles) == {1, 2}, "decode steps of two rows and steps with chunks"
    assert driver.step({"a": [1], "b": [2]}, samples=set()) == {}


def test_a_step_beyond_the_profiles_is_named(workshop, random_ids):
    driver, _ = segment_driver(workshop, "gqa")
    with pytest.raises(ConfigError, match="a step of 129 tokens and 1 rows: these engines take 128 and 4"):
        driver.step({"a": random_ids(129, 1)})


def test_steps_with_chunks_run_the_general_profile_however_short(workshop, random_ids):
    """A chunk of three tokens ran a profile of decode steps: RTX compiled for its size while all others waited."""
    driver, segments = segment_driver(workshop, "gqa")
    driver.step({"a": random_ids(2, 1)})
    driver.step({"a": [5], "b": random_ids(2, 2)})
    assert set(segments.profiles) == {2}
    segments.profiles.clear()
    driver.step({"a": [6]})
    assert set(segments.profiles) == {0}


def test_the_runner_is_told_what_to_run_first_and_what_to_capture(workshop):
    """Of twenty sizes three had run before serving: the others were compiled while requests waited."""
    model = segment_driver(workshop, "gqa")[0].model.model
    assert model.prepares_sizes and model.can_capture(7) and not model.can_capture(3)
    folder = workshop.engine("gqa", TorchLowering(), "fp32", "fp32")
    kernels = KernelModel.load(open_engine(folder, "torch"), torch.device("cpu"), torch.float32)
    assert not kernels.prepares_sizes and kernels.can_capture(3)


def test_what_was_compiled_is_kept_after_the_warm_up_and_at_the_end(workshop):
    """It was kept at the end only: a server that was killed began every time with compiling."""
    driver, segments = segment_driver(workshop, "gqa")
    driver.model.model.warmed_up()
    assert segments.saved == 1
    driver.model.model.close()
    assert segments.saved == 2


@pytest.mark.parametrize("kind", [RuntimeError, TypeError, AttributeError])
def test_engines_that_load_and_do_not_run_are_found_out_while_loading(workshop, monkeypatch, kind):
    """A card for which kernels are compiled at the first step only: the first request would have met the refusal. What
    the bindings raise is not documented; anything but a RuntimeError ended the core, where kernels could have served.
    """
    driver, segments = segment_driver(workshop, "gqa")
    folder = workshop.engine("gqa", TorchLowering(), "fp32", "fp32")
    driver.model.model._plan.write(folder)
    engine = open_engine(folder, "torch")
    assert load_segments(engine, folder, torch.device("cpu"), segments).blocks.cache is None, "the trial left blocks"
    segments.fault = kind("no kernels for SM90")
    with pytest.raises(ConfigError, match=r"rtx TensorRT cannot run it here: no kernels for SM90"):
        load_segments(engine, folder, torch.device("cpu"), segments)

    def broken(flavor):
        raise kind("another binding")

    monkeypatch.setattr(tensorrt_model, "import_flavor", broken)
    with pytest.raises(ConfigError, match=r"rtx TensorRT cannot run it here: another binding"):
        load_segments(engine, folder, torch.device("cpu"))
