"""TensorRT engines are really built, by the RTX flavor; what cannot be built is refused by name."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import tensorrt_rtx as trt

from pageflight.core.errors import ConfigError, ManifestMismatch
from pageflight.lowering.tensorrt_build import build_network, lower
from pageflight.lowering.tensorrt_lowering import TensorRtLowering
from pageflight.lowering.tensorrt_plan import EnginePlan, decode_buckets, profiles
from pageflight.lowering.tensorrt_target import TensorRtTarget, known_capabilities
from pageflight.models.config import DecoderConfig
from pageflight.quant.forms import weight_forms

CONFIG = DecoderConfig(
    family="llama", vocab_size=257, hidden_size=128, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32,
    intermediate_size=256, max_positions=512, rms_norm_eps=1e-5,
)  # fmt: skip
NEW = TensorRtTarget(compute_capabilities=(89, 120))
CASES = {
    "fp32": ("fp32", 0, False),
    "fp16": ("fp16", 0, False),
    "bf16": ("bf16", 0, False),
    "fp8": ("fp8", 0, False),
    "fp8 static": ("fp8", 0, True),
    "int8": ("int8", 0, False),
    "int8 groups": ("int8", 64, False),
    "int8 static": ("int8", 0, True),
    "int4": ("int4", 64, False),
    "int4 rows": ("int4", 0, False),
}


def networks(dtype, group_size=0, static=False, config=CONFIG):
    forms = weight_forms(config, dtype, group_size)
    names = [name for name, form in forms.items() if form.scales and name != "head"] if static else []
    forms = weight_forms(config, dtype, group_size, names)
    return lower(trt, config, forms, activations=TensorRtLowering().activations(dtype), num_positions=512)


@pytest.mark.parametrize("case", CASES)
def test_every_segment_of_every_precision_builds(case):
    """A layer that the network takes is not a layer that the builder can build."""
    made = networks(*CASES[case])
    assert list(made.segments) == ["first", "mid", "last"]
    steps = profiles(8, 64)
    sizes = {name: len(build_network(trt, made, name, NEW, steps)) for name in made.segments}
    assert all(size > 10_000 for size in sizes.values()), sizes


@pytest.mark.parametrize("case", ["fp8", "fp8 static", "int8", "int8 static"])
def test_scales_of_layers_that_quantise_are_constants(case):
    """TensorRT's references say so; RTX built them as inputs all the same, and the other flavor may not."""
    made = networks(*CASES[case])
    counted = 0
    for network in made.segments.values():
        for index in range(network.definition.num_layers):
            layer = network.definition.get_layer(index)
            if layer.type in (trt.LayerType.QUANTIZE, trt.LayerType.DEQUANTIZE):
                assert layer.get_input(1).name in network.arrays, layer.get_input(1).name
                counted += 1
    assert counted >= 5, "a product of every matrix dequantises it"


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
        {"tied_head": True},
        {"num_layers": 1},
        {"hidden_size": 80, "num_heads": 2, "num_kv_heads": 1, "head_dim": 80, "intermediate_size": 160},
        {"hidden_size": 75, "num_heads": 5, "num_kv_heads": 5, "intermediate_size": 99, "vocab_size": 131},
    ],
)
def test_every_kind_of_llama_builds(changes):
    """Sizes that are no multiple of anything are slow, not impossible."""
    made = networks("fp8", config=replace(CONFIG, **changes))
    for name in made.segments:
        build_network(trt, made, name, NEW, profiles(1, 16))


def test_a_builder_that_cannot_says_why():
    """It returned None, and the error was about NoneType."""
    made = networks("fp8")
    with pytest.raises(ConfigError, match=r"cannot build segment 'mid': .*fp8"):
        build_network(trt, made, "mid", TensorRtTarget(compute_capabilities=(80,)), profiles(1, 16))


def test_a_full_builder_that_refuses_scales_of_groups_is_told_of_the_way_out():
    """Its references allow constants only; with the weights in the engine they are."""
    target = TensorRtTarget(flavor="full", compute_capabilities=(75,))
    with pytest.raises(ConfigError, match=r"scales of groups are inputs here.*--weights constant has none"):
        build_network(trt, networks("int4", 64), "mid", target, profiles(1, 16))
    with pytest.raises(ConfigError) as refused:
        build_network(trt, networks("fp8"), "mid", target, profiles(1, 16))
    assert "--weights constant" not in str(refused.value)


def test_a_package_without_the_gpu_it_wants_says_so(monkeypatch):
    """Its constructor gave nothing, and Python said so: factory function returned nullptr."""

    def nothing(log):
        log.log(trt.ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(trt, "Builder", nothing)
    with pytest.raises(ConfigError, match=r"CUDA initialization failure .* flavor 'full' needs the GPU"):
        networks("bf16")


@pytest.mark.parametrize(
    ("capabilities", "dtype", "says"),
    [
        ((90,), "bf16", r"compute_capability=90: tensorrt_rtx .* builds for 75,80,86,89,120,121"),
        ((75, 89), "bf16", "compute_capability=75: dtype bf16 needs 80 or later"),
        ((80, 86, 89), "fp8", "compute_capability=80,86: dtype fp8 needs 89 or later"),
    ],
)
def test_gpus_that_cannot_are_refused_before_anything_is_built(capabilities, dtype, says):
    """The builder's own words came after the weights had been converted."""
    lowering = TensorRtLowering(TensorRtTarget(compute_capabilities=capabilities))
    with pytest.raises(ConfigError, match=says):
        lowering.check(CONFIG, dtype, "bf16")


def test_the_least_capabilities_are_those_of_the_builder():
    """The table would go stale with the next version of the package."""
    for dtype in ("fp16", "bf16", "fp8"):
        for capability in known_capabilities(trt):
            target = TensorRtTarget(compute_capabilities=(capability,))
            lowering = TensorRtLowering(target)
            try:
                lowering.check(CONFIG, dtype, lowering.default_kv_dtype(dtype))
                allowed = True
            except ConfigError:
                allowed = False
            made = networks(dtype)
            try:
                build_network(trt, made, "mid", target, profiles(1, 16))
                built = True
            except ConfigError:
                built = False
            assert built == allowed, (dtype, capability)


def test_the_missing_package_is_named_with_its_source(monkeypatch):
    """No module named 'tensorrt' tells nobody where to get it."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ConfigError, match=r"flavor='full' needs the package tensorrt, .*nvcr\.io/nvidia/tensorrt"):
        TensorRtLowering(TensorRtTarget(flavor="full")).fingerprint("bf16")


def test_a_cache_of_another_type_is_refused():
    """Segments hand over bf16: attention would have read it as bytes."""
    with pytest.raises(ConfigError, match=r"kv_dtype='u8': supported with engine .* dtype 'fp8' are bf16, fp8"):
        TensorRtLowering().check(CONFIG, "fp8", "u8")


def test_layers_that_differ_cannot_share_an_engine():
    """The second layer's fp8 weights were read as the first one's bf16."""
    forms = weight_forms(CONFIG, "fp8")
    forms["layers.2.qkv"] = weight_forms(CONFIG, "bf16")["layers.2.qkv"]
    with pytest.raises(ManifestMismatch, match=r"layers\.2\.qkv .* need weights=constant"):
        lower(trt, CONFIG, forms, activations="bf16", num_positions=512)


@pytest.mark.parametrize(
    ("most", "buckets"), [(1, (1,)), (2, (1, 2)), (4, (1, 4)), (5, (1, 4, 5)), (256, (1, 4, 16, 64, 256))]
)
def test_profiles_leave_no_gap(most, buckets):
    """A batch of 5 fitted no profile."""
    assert decode_buckets(most) == buckets
    *decode, prefill = profiles(most, 512)
    for tokens in range(1, most + 1):
        assert sum(item.min_tokens <= tokens <= item.max_tokens for item in decode) == 1
    assert (prefill.min_tokens, prefill.max_tokens, prefill.max_rows) == (1, 512, most)
    assert all(item.max_tokens <= 3 for item in profiles(64, 3)), "no step has more tokens than that"


@pytest.mark.parametrize("damage", ["no JSON", "version", "entry", "missing"])
def test_a_damaged_plan_is_refused(tmp_path, damage):
    """A runner would bind whatever it found."""
    plan = EnginePlan(
        flavor="rtx", compute_capabilities=(89,), activations="bf16", weights="input", profiles=profiles(2, 8),
        segments=(), runs=(),
    )  # fmt: skip
    plan.write(tmp_path)
    assert EnginePlan.read(tmp_path) == plan
    path = tmp_path / "segments.json"
    text = path.read_text()
    if damage == "missing":
        path.unlink()
    else:
        old, new = {"no JSON": ("{", ""), "version": ("1,", "9,"), "entry": ('"flavor"', '"taste"')}[damage]
        path.write_text(text.replace(old, new, 1))
    with pytest.raises(ManifestMismatch, match=r"segments\.json"):
        EnginePlan.read(tmp_path)
