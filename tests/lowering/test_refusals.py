"""Engines that do not fit this machine, version or their own manifest are refused with the reason."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from pageflight.core.errors import ConfigError, ManifestMismatch
from pageflight.lowering import registry
from pageflight.lowering.openvino_lowering import OpenVinoLowering


def change_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def engine(workshop, tmp_path, lowering):
    source = workshop.engine("gqa", registry.get(lowering), "bf16", "native")
    return shutil.copytree(source, tmp_path / "engine")


def refused(engine, lowering):
    with pytest.raises(ManifestMismatch) as caught:
        registry.get(lowering).load(engine, num_threads=1)
    return str(caught.value)


def test_the_copy_itself_loads(engine, lowering):
    """Without this, the refusals below could come from anything."""
    registry.get(lowering).load(engine, num_threads=1).close()


def test_another_machine_or_version_is_refused_by_name(engine, lowering):
    """The message says what was built and what is here."""
    built = registry.get(lowering).fingerprint("bf16")
    change_manifest(engine, fingerprint={**built, "machine": "riscv64", lowering: "0.1"})
    message = refused(engine, lowering)
    assert "machine 'riscv64', here" in message
    assert f"{lowering} '0.1', here" in message


def test_another_lowering_is_refused(engine, lowering):
    """An engine of one lowering opened by the other."""
    change_manifest(engine, lowering="tensorrt")
    assert "lowering='tensorrt'" in refused(engine, lowering)


@pytest.mark.parametrize(
    "changes", [{"dtype": "fp4"}, {"kv_dtype": "u4"}, {"tensor_parallel": 2}, {"vocab_size": 5}, {"block_size": 16}]
)
def test_a_manifest_this_runtime_cannot_run_is_refused(engine, lowering, changes):
    """Unknown precisions ran as the default one."""
    if lowering == "torch" and "block_size" in changes:
        pytest.skip("torch takes any block size")
    change_manifest(engine, **changes)
    name, value = next(iter(changes.items()))
    message = refused(engine, lowering)
    assert name in message
    assert str(value) in message


def test_changed_truncated_and_missing_weights_are_refused(engine, lowering):
    """One flipped bit in a weight gives other text, not an error."""
    path = engine / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert "sha256" in refused(engine, lowering)
    path.write_bytes(data[:-5])
    assert f"has {len(data) - 5} bytes" in refused(engine, lowering)
    path.unlink()
    assert "is missing" in refused(engine, lowering)


def test_an_engine_that_needs_bf16_arithmetic_is_refused_on_a_cpu_without_it(workshop, tmp_path, monkeypatch):
    """The plugin would emulate it, a hundred times slower, without a word."""
    lowering = OpenVinoLowering()
    engine = workshop.engine("gqa", lowering, "bf16", "native")
    elsewhere = shutil.copytree(engine, tmp_path / "engine")
    change_manifest(elsewhere, fingerprint={**lowering.fingerprint("bf16"), "activations": "bf16"}, kv_dtype="bf16")
    monkeypatch.setattr(OpenVinoLowering, "_has_bf16", lambda self: False)
    with pytest.raises(ManifestMismatch, match="activations 'bf16', here 'fp32'"):
        lowering.load(elsewhere, num_threads=1)


def test_bf16_weights_run_in_float32_on_a_cpu_without_bf16(workshop, random_ids, monkeypatch):
    """A checkpoint in bf16 is served on any CPU, with the values of its weights."""
    monkeypatch.setattr(OpenVinoLowering, "_has_bf16", lambda self: False)
    lowering = OpenVinoLowering()
    for dtype in ("bf16", "int8"):
        assert lowering.fingerprint(dtype)["activations"] == "fp32"
        assert lowering.default_kv_dtype(dtype) == "fp32"
    ids = random_ids(50)
    found = workshop.driver("head-80", "openvino", "bf16", "fp32").step({"a": ids})["a"]
    model = workshop.reference("head-80")
    original = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        with torch.inference_mode():
            for _name, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    parameter.copy_(parameter.bfloat16().float())
            expected = model(torch.tensor([ids])).logits[0, -1].numpy()
    finally:
        model.load_state_dict(original)
    assert np.abs(found - expected).max() <= 1e-4


def test_unknown_lowerings_and_precisions_are_refused():
    """A typing error must not become the default."""
    with pytest.raises(ConfigError, match="lowering='openvin'"):
        registry.get("openvin")
    for name in registry.NAMES:
        with pytest.raises(ConfigError, match="dtype='fp4'"):
            registry.get(name).fingerprint("fp4")


def test_importing_a_lowering_loads_no_other_framework_and_no_telemetry():
    """OpenVINO reports its import to its vendor where openvino_telemetry can be imported."""
    code = (
        "import sys; from pageflight.lowering import registry; assert 'openvino' not in sys.modules;"
        "registry.get('openvino');"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules;"
        "assert not [m for m in sys.modules if m.startswith('openvino_telemetry.')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_building_for_gpus_needs_no_torch_and_its_package_only_when_it_builds():
    """A CPU server imported 4 GB to learn that a manifest was not for it."""
    code = (
        "import sys; from pageflight.lowering import registry; from pageflight.quant import convert, store;"
        "registry.get('tensorrt'); import pageflight_build.recipe;"
        "assert not {'torch', 'tensorrt', 'tensorrt_rtx', 'openvino'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
