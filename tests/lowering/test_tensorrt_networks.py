"""TensorRT networks without a GPU: walked in torch, every one equals the reference lowering."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import tensorrt_rtx as trt
import torch

from pageflight.core.manifest import EngineManifest, FileRecord
from pageflight.lowering.engine_dir import open_engine
from pageflight.lowering.tensorrt_build import build_network, lower
from pageflight.lowering.tensorrt_ops import stored_name
from pageflight.lowering.tensorrt_plan import profiles
from pageflight.lowering.tensorrt_target import TensorRtTarget
from pageflight.lowering.torch_lowering import TorchLowering
from pageflight.quant.float8 import quantise_fp8
from pageflight.quant.forms import scale_name

from .conftest import SHAPES, Driver
from .walked_model import WalkedModel

INPUT_SCALE = 0.03125
FLIPPED = 0.06
"""A last bit may decide which way an activation is rounded, and the next layers carry that on."""
QUANTISED = {
    "fp8": ("fp8", 0, None),
    "fp8 static": ("fp8", 0, INPUT_SCALE),
    "int8": ("int8", 0, None),
    "int8 groups": ("int8", 32, None),
    "int8 static": ("int8", 0, INPUT_SCALE),
    "int4": ("int4", 64, None),
    "int4 rows": ("int4", 0, None),
}
FORMS = {"fp16": ("fp16", 0, None), "bf16": ("bf16", 0, None), **QUANTISED}


def walked(workshop, shape, dtype="fp32", activations="fp32", *, group_size=0, input_scale=None, constant=False):
    """A driver of the walked networks, over the weights that the torch engine has."""
    key = (shape, dtype, activations, group_size, input_scale, constant)
    if key not in workshop.cache:
        folder = workshop.engine(shape, TorchLowering(), dtype, "native", group_size, input_scale)
        model = WalkedModel(trt, open_engine(folder, "torch"), activations=activations, constant=constant)
        driver = Driver(model)
        model.allocate(driver.num_blocks)
        workshop.cache[key] = driver
    driver = workshop.cache[key]
    driver.forget()
    return driver


def scenario(driver, random_ids):
    """Logits [rows, V] of chunks, decoding, a shared prefix and a copied block."""
    rows = [
        driver.step({"a": random_ids(40, 3), "b": random_ids(70, 4)}),
        driver.step({"a": random_ids(30, 5), "b": [7], "c": random_ids(33, 6)}, {"b"}),
        driver.step({"c": [9], "a": [8], "b": [7]}),
    ]
    driver.share("b", "d", 2)
    rows.append(driver.step({"d": random_ids(10, 9), "b": [11]}))
    driver.fork("a", "e")
    rows.append(driver.step({"a": [12], "e": [13]}))
    return np.concatenate([np.stack(list(step.values())) for step in rows])


def relative_error(found, expected):
    return float(np.sqrt(np.mean((found - expected) ** 2)) / expected.std())


@pytest.mark.parametrize("shape", [*sorted(SHAPES), "one-layer", "two-layers"])
@pytest.mark.parametrize("constant", [False, True], ids=["input", "constant"])
def test_float32_networks_equal_the_reference(workshop, random_ids, shape, constant):
    """The residual of the layer before last, another layer's weights, K rotated twice: each gave plausible text."""
    expected = scenario(workshop.driver(shape, "torch"), random_ids)
    found = scenario(walked(workshop, shape, constant=constant), random_ids)
    assert np.abs(found - expected).max() <= 1e-4


@pytest.mark.parametrize("form", QUANTISED)
@pytest.mark.parametrize("constant", [False, True], ids=["input", "constant"])
def test_weights_of_every_form_equal_the_reference_of_that_form(workshop, random_ids, form, constant):
    """Scales along the wrong axis still look like weights."""
    dtype, group_size, input_scale = QUANTISED[form]
    options = {"group_size": group_size, "input_scale": input_scale}
    expected = scenario(workshop.driver("quantisable", "torch", dtype, "fp32", **options), random_ids)
    found = scenario(walked(workshop, "quantisable", dtype, "fp32", constant=constant, **options), random_ids)
    rounds_activations = dtype == "fp8" or input_scale is not None
    assert relative_error(found, expected) <= (FLIPPED if rounds_activations else 1e-5)


def test_a_scale_for_the_whole_weight_is_one_for_every_row(workshop, random_ids, tmp_path):
    """Checkpoints in fp8 often have one scale per tensor; convert never writes them."""
    folder = shutil.copytree(workshop.engine("quantisable", TorchLowering(), "fp8", "fp32"), tmp_path / "engine")
    store = open_engine(folder, "torch").weights
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    for name, form in store.forms.items():
        if form.dtype == "F8_E4M3":
            values = store[name].float32()
            codes, scales = quantise_fp8(values, float(np.abs(values).max()))
            tensors[name] = torch.from_numpy(codes).view(torch.float8_e4m3fn)
            tensors[scale_name(name)] = torch.from_numpy(scales)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    manifest = EngineManifest.read(folder)
    data = (folder / "model.safetensors").read_bytes()
    record = FileRecord(path="model.safetensors", num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    replace(manifest, files=(record,)).write(folder)
    logits = []
    for model in (
        TorchLowering().load(folder, num_threads=1),
        WalkedModel(trt, open_engine(folder, "torch"), activations="fp32"),
    ):
        driver = Driver(model)
        model.allocate(driver.num_blocks)
        logits.append(scenario(driver, random_ids))
    assert relative_error(logits[1], logits[0]) <= FLIPPED
    by_row = scenario(workshop.driver("quantisable", "torch", "fp8", "fp32"), random_ids)
    assert relative_error(logits[0], by_row) > 2 * FLIPPED, "the scales were not those of the rows"


@pytest.mark.parametrize("form", FORMS)
def test_engines_as_built_are_no_further_from_their_reference_than_that_is_from_float32(workshop, random_ids, form):
    """Activations in half precision add less than the weights' rounding took away."""
    dtype, group_size, input_scale = FORMS[form]
    options = {"group_size": group_size, "input_scale": input_scale}
    exact = scenario(workshop.driver("quantisable", "torch"), random_ids)
    reference = scenario(workshop.driver("quantisable", "torch", dtype, "native", **options), random_ids)
    found = scenario(
        walked(workshop, "quantisable", dtype, "fp16" if dtype == "fp16" else "bf16", **options), random_ids
    )
    assert 0 < relative_error(found, reference) <= relative_error(reference, exact)


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "int8", "int4"])
def test_engines_with_their_weights_inside_build(workshop, dtype):
    """Constants of the small formats have types of their own, and memory that must outlive the network."""
    folder = workshop.engine("quantisable", TorchLowering(), dtype, "native", 64 if dtype == "int4" else 0)
    engine = open_engine(folder, "torch")
    networks = lower(
        trt, engine.config, engine.weights.forms, activations="bf16", num_positions=512, constants=engine.weights
    )
    assert list(networks.segments) == ["first", "mid1", "mid2", "last"]
    weights = ("next.qkv", "this.output", "this.gate_up", "this.down")
    stored = sum(engine.weights[stored_name(name, 1)].values.nbytes for name in weights)
    target = TensorRtTarget(compute_capabilities=(89,), weights="constant")
    assert len(build_network(trt, networks, "mid1", target, profiles(4, 16))) > stored
