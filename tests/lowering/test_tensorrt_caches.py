"""What TensorRT learnt about a GPU is kept, found again, and never believed when it is damaged."""

from __future__ import annotations

import ctypes
import logging
from types import SimpleNamespace

import pytest
import tensorrt_rtx as trt
import torch

from pageflight.core.errors import ConfigError
from pageflight.lowering import tensorrt_caches
from pageflight.lowering.tensorrt_caches import (
    RuntimeCache,
    TimingCache,
    cache_folder,
    read_cache,
    runtime_path,
    timing_path,
    write_cache,
)
from pageflight.lowering.tensorrt_engines import TensorRtSegments
from pageflight.lowering.tensorrt_gpu import Gpu, find_gpu
from pageflight.lowering.tensorrt_plan import EnginePlan, Segment, TensorSpec, profiles

from .fake_tensorrt import FakeTensorRt

GPU = Gpu(name="NVIDIA H200", capability=90, driver=13000)
PLAN = EnginePlan(
    flavor="rtx",
    compute_capabilities=(89, 120),
    activations="fp32",
    weights="input",
    profiles=profiles(4, 16),  # decode-1, decode-4, prefill
    segments=tuple(
        Segment(
            name=name,
            file=f"{name}.engine",
            num_bytes=1,
            inputs=(
                TensorSpec(name="x", kind="activation", dtype="fp32", shape=("T", 4)),
                TensorSpec(name="w", kind="weight", dtype="fp32", shape=(4, 4)),
            ),
            outputs=(TensorSpec(name="y", kind="activation", dtype="fp32", shape=("T", 4)),),
        )
        for name in ("first", "last")
    ),
    runs=(),
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An engine directory; caches go to a folder beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": 7}))
    made = tmp_path / "engine"
    made.mkdir()
    for segment in PLAN.segments:
        (made / segment.file).write_bytes(segment.name.encode())
    return made


def start(fake, folder, path=None):
    kernels = None if path is None else RuntimeCache(path)
    return TensorRtSegments(fake, folder, PLAN, torch.device("cpu"), kernels=kernels)


def run(segments, name="first", profile=1, tokens=3):
    tensors = {"x": torch.zeros(tokens, 4), "w": torch.zeros(4, 4)}
    segments.run(name, profile, tensors, {"y": torch.zeros(tokens, 4)})


def test_contexts_are_made_in_the_order_that_tensorrt_asks_for(folder):
    """A context without its profile takes no shape, and one without memory writes anywhere."""
    fake = FakeTensorRt()
    segments = start(fake, folder, folder.parent / "kernels")
    fake.calls.clear()
    run(segments)
    names = [call[0] for call in fake.calls]
    assert names == [
        "create_runtime_config", "create_runtime_cache", "set_runtime_cache", "create_execution_context",
        "set_optimization_profile_async", "set_device_memory", "set_input_shape", "set_tensor_address",
        "set_tensor_address", "set_tensor_address", "execute_async_v3",
    ]  # fmt: skip
    assert ("set_input_shape", "x", (3, 4)) in fake.calls and fake.calls[-1] == ("execute_async_v3", 7)
    fake.calls.clear()
    run(segments)
    assert not {"create_execution_context", "set_device_memory"} & {call[0] for call in fake.calls}


def test_all_contexts_share_the_memory_of_the_largest(folder):
    """Every profile of every segment had the memory of the largest prompt chunk to itself."""
    fake = FakeTensorRt(sizes={"first": 512, "last": 2048})
    segments = start(fake, folder)
    for name in ("first", "last"):
        for profile in range(3):
            run(segments, name, profile, tokens=1)
    given = {call[1:] for call in fake.calls if call[0] == "set_device_memory"}
    assert len(given) == 1 and next(iter(given))[1] == 2048


def test_a_context_that_was_captured_keeps_its_shapes(folder):
    """Graphs of 4 and of 2 rows came from one context: after the second, replaying the first is undefined."""
    fake = FakeTensorRt()
    segments = start(fake, folder)
    for tokens in (4, 2, 4):
        run(segments, profile=1, tokens=tokens)
    assert [context.shapes for context in fake.contexts] == [[(4, 4)], [(2, 4)]]
    for tokens in (4, 2, 4):
        run(segments, profile=2, tokens=tokens)
    assert [context.shapes for context in fake.contexts[2:]] == [[(4, 4), (2, 4), (4, 4)]], "any length, no graphs"
    assert len({call[1:] for call in fake.calls if call[0] == "set_device_memory"}) == 1


def test_contexts_that_sum_over_ranks_are_given_their_communicator(folder):
    """A context without one runs its sums as if it were alone. What one rank alone can be refused comes before: where
    contexts are given a communicator, they wait for those of all ranks."""
    fake = FakeTensorRt()
    segments = start(fake, folder)
    segments.try_contexts()
    names = [call[0] for call in fake.calls]
    assert names.count("create_execution_context") == 2 and "set_communicator" not in names
    segments.join("ranks")
    run(segments)
    assert fake.calls.count(("set_communicator", "ranks")) == 1
    fake.refuses_ranks = True
    with pytest.raises(RuntimeError, match="does not take NCCL's communicator for last"):
        run(segments, "last")


def test_what_cannot_be_captured_is_known_before(folder):
    """A capture that fails leaves torch in a state of its own: TensorRT is asked, for all segments of decode steps."""
    fake = FakeTensorRt()
    segments = start(fake, folder)
    run(segments, "first")
    fake.uncapturable = {"last"}
    run(segments, "last", profile=2)
    assert segments.can_capture(7), "steps with chunks are not captured"
    run(segments, "last", profile=1)
    assert not segments.can_capture(7) and ("is_stream_capturable", 7) in fake.calls
    fake.uncapturable = None
    assert segments.can_capture(7), "the full flavor cannot be asked"


def test_only_decode_steps_compile_for_their_size(folder):
    """A prompt chunk of a new length stopped all streams while kernels for just that length were compiled."""
    fake = FakeTensorRt()
    segments = start(fake, folder, folder.parent / "kernels")
    for profile in range(3):
        run(segments, profile=profile, tokens=1)
    kinds = trt.DynamicShapesKernelSpecializationStrategy
    assert [item.dynamic_shapes_kernel_specialization_strategy for item in fake.settings] == [
        kinds.EAGER, kinds.EAGER, kinds.NONE,
    ]  # fmt: skip


def test_kernels_of_one_start_are_there_for_the_next(folder):
    """Each start compiled everything again."""
    path = runtime_path({"tensorrt_rtx": "1.7"}, ["abc"], GPU)
    first = start(FakeTensorRt(), folder, path)
    run(first)
    first.save()
    written = path.stat().st_mtime_ns
    fake = FakeTensorRt()
    second = start(fake, folder, path)
    run(second, "first")
    run(second, "last")
    assert fake.caches == [b"kernels of first;kernels of last;"], "one cache for both engines, and what was there kept"
    second.save()
    assert path.stat().st_mtime_ns > written and read_cache(path) == fake.caches[0]
    inode = path.stat().st_ino
    second.save()
    assert path.stat().st_ino == inode, "nothing new, nothing written"


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "refused"])
def test_a_damaged_cache_is_not_given_to_tensorrt(folder, caplog, damage):
    """What a full disk had cut off was deserialised: in C++, by whoever finds it."""
    path = runtime_path({}, ["abc"], GPU)
    write_cache(path, b"kernels of another driver;")
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-1] ^= 1
    path.write_bytes({"cut": content[:-3], "empty": b""}.get(damage, content))
    fake = FakeTensorRt(accepts=damage != "refused")
    with caplog.at_level(logging.WARNING):
        segments = start(fake, folder, path)
        run(segments)
    assert ("does not fit" if damage == "refused" else "is damaged") in caplog.text
    assert [call for call in fake.calls if call[0] == "deserialize"] == (
        [("deserialize", b"kernels of another driver;")] if damage == "refused" else []
    )
    segments.save()
    assert read_cache(path) == b"kernels of first;"


def test_a_folder_that_cannot_be_written_costs_time_only(folder, caplog, monkeypatch):
    """A container with a read-only home did not start."""
    (folder.parent / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "file"))
    segments = start(FakeTensorRt(), folder, runtime_path({}, ["abc"], GPU))
    run(segments)
    segments.save()
    assert "cannot be written" in caplog.text and "cannot be read" in caplog.text


@pytest.mark.parametrize("fault", [None, RuntimeError("no memory"), TypeError("nothing to convert")])
def test_a_cache_that_tensorrt_does_not_give_costs_time_only(folder, caplog, fault):
    """The core ended after its warm-up, or at its end, over a file that it does not need."""
    path = runtime_path({}, ["abc"], GPU)
    fake = FakeTensorRt()
    segments = start(fake, folder, path)
    run(segments)
    fake.hides, fake.is_mute = fault, True
    segments.save()
    assert not path.exists() and str(fault or "it gave no reason") in caplog.text
    timings = TimingCache(path)
    timings.data = b"timing;"
    mute = SimpleNamespace(serialize=lambda: None)
    timings.take(SimpleNamespace(get_timing_cache=lambda: mute))
    assert timings.data == b"timing;", "what earlier engines gave is kept"


def test_a_cache_that_breaks_off_leaves_the_old_one(folder, monkeypatch, caplog):
    """Two starts at once, or one that is killed, left half a file."""
    path = timing_path("tensorrt", "11.4", GPU)
    write_cache(path, b"old")

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorrt_caches.os, "replace", full)
    write_cache(path, b"new")
    assert read_cache(path) == b"old" and "No space left" in caplog.text


def test_caches_of_other_gpus_drivers_and_engines_have_other_names(folder):
    """Kernels of one card were offered to another."""
    paths = {
        runtime_path({"tensorrt_rtx": version}, [digest], Gpu(name=name, capability=89, driver=driver))
        for version, digest, name, driver in (
            ("1.7", "a", "RTX 4090", 13000),
            ("1.8", "a", "RTX 4090", 13000),
            ("1.7", "b", "RTX 4090", 13000),
            ("1.7", "a", "RTX 5090", 13000),
            ("1.7", "a", "RTX 4090", 13010),
        )
    }
    assert len(paths) == 5 and {path.parent for path in paths} == {cache_folder()}
    assert timing_path("tensorrt", "11.4", GPU) != timing_path("tensorrt", "11.5", GPU)
    assert timing_path("tensorrt", "11.4", GPU).name == "timing-tensorrt-11.4-nvidia-h200.cache"


@pytest.mark.parametrize("given", [None, "relative"])
def test_without_a_folder_of_its_own_the_cache_is_in_the_home(monkeypatch, tmp_path, given):
    """A relative $XDG_CACHE_HOME counts as none: it would be another folder for every start."""
    monkeypatch.setenv("HOME", str(tmp_path))
    if given is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert cache_folder() == tmp_path / ".cache" / "pageflight" / "tensorrt"


def test_an_engine_that_the_card_does_not_take_is_named(folder):
    """RTX engines for other compute capabilities: no traceback, but what is wrong, where, and TensorRT's own reason."""
    says = r"first\.engine: rtx TensorRT 1\.7 does not take it on a processor \(built for 89,120\): no kernels for SM90"
    with pytest.raises(ConfigError, match=says):
        start(FakeTensorRt(refuses="no kernels for SM90"), folder)


class Timings:
    """Builder settings as the full flavor has them."""

    def __init__(self, accepts=True):
        self.accepts, self.attached = accepts, None

    def create_timing_cache(self, data):
        return bytearray(data)

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch
        if cache and not self.accepts:
            return False
        self.attached = cache
        return True

    def get_timing_cache(self):
        timings = bytes(self.attached) + b"timing;"
        return type("Cache", (), {"serialize": lambda self: timings})()


def test_timings_go_from_engine_to_engine_and_from_build_to_build(folder, caplog):
    """Every build measured every kernel."""
    path = timing_path("tensorrt", "11.4", GPU)
    cache = TimingCache(path)
    for _ in range(2):
        settings = Timings()
        cache.attach(settings)
        cache.take(settings)
    cache.save()
    assert read_cache(path) == b"timing;timing;" == cache.data
    again, other = TimingCache(path), Timings(accepts=False)
    again.attach(other)
    assert other.attached == b"" and "does not fit this GPU and TensorRT" in caplog.text
    settings = Timings()
    TimingCache(path).attach(settings)
    assert settings.attached == b"timing;timing;"


class Driver:
    """libcuda.so.1 with one GPU."""

    def __init__(self, failing=""):
        self.failing = failing

    def __getattr__(self, name):
        def call(*arguments):
            if name == self.failing:
                return 100  # CUDA_ERROR_NO_DEVICE
            if name == "cuDeviceGetName":
                arguments[0].value = b"NVIDIA H200"
            elif name == "cuDeviceGetAttribute":
                arguments[0]._obj.value = {75: 9, 76: 0}[arguments[1]]
            elif name == "cuDriverGetVersion":
                arguments[0]._obj.value = 13000
            return 0

        return call


def test_the_gpu_is_asked_from_its_driver(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert find_gpu() == GPU
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(failing="cuDeviceGet"))
    assert find_gpu() is None


def test_the_names_of_the_fake_are_those_of_the_package():
    """A test of a call that no package has proves nothing; on a GPU it would be the first to fail."""
    real = {
        "ICudaEngine": ("create_runtime_config", "create_execution_context", "device_memory_size_v2"),
        "IRuntimeConfig": (
            "create_runtime_cache",
            "set_runtime_cache",
            "set_execution_context_allocation_strategy",
            "dynamic_shapes_kernel_specialization_strategy",
        ),
        "IRuntimeCache": ("serialize", "deserialize"),
        "IExecutionContext": (
            "set_optimization_profile_async",
            "set_device_memory",
            "set_input_shape",
            "set_tensor_address",
            "execute_async_v3",
            "is_stream_capturable",
            "set_communicator",
        ),
        "INetworkDefinition": ("add_dist_collective",),
        "IBuilderConfig": ("create_timing_cache", "set_timing_cache", "get_timing_cache"),
        "Runtime": ("deserialize_cuda_engine",),
    }
    missing = [
        (owner, name) for owner, names in real.items() for name in names if not hasattr(getattr(trt, owner), name)
    ]
    assert not missing
