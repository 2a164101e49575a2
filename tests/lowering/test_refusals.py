"""Engines that do not fit this machine, version or their own manifest are refused with the reason."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from pageflight.core.errors import ConfigError, ManifestMismatch
from pageflight.lowering import registry
from pageflight.lowering.openvino_lowering import OpenVinoLowering


def change_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def engine(workshop, tmp_path, lowering):
    source = workshop.engine("gqa", registry.get(lowering), "bf16", "bf16")
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
    "changes", [{"dtype": "fp8"}, {"kv_dtype": "u4"}, {"tensor_parallel": 2}, {"vocab_size": 5}, {"block_size": 16}]
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


def test_bf16_is_refused_on_a_cpu_without_it(workshop, monkeypatch):
    """The plugin would emulate it, several times slower, without a word."""
    engine = workshop.engine("gqa", OpenVinoLowering(), "bf16", "bf16")
    monkeypatch.setattr(OpenVinoLowering, "_has_bf16", lambda self: False)
    lowering = OpenVinoLowering()
    with pytest.raises(ConfigError, match="no bf16 arithmetic"):
        lowering.fingerprint("bf16")
    with pytest.raises(ManifestMismatch, match="no bf16 arithmetic"):
        lowering.load(engine, num_threads=1)
    assert lowering.fingerprint("int8")["activations"] == "fp32"
    assert lowering.default_kv_dtype("int8") == "fp32"


def test_unknown_lowerings_and_precisions_are_refused():
    """A typing error must not become the default."""
    with pytest.raises(ConfigError, match="lowering='openvin'"):
        registry.get("openvin")
    for name in registry.NAMES:
        with pytest.raises(ConfigError, match="dtype='fp16'"):
            registry.get(name).fingerprint("fp16")


def test_importing_a_lowering_loads_no_other_framework_and_no_telemetry():
    """OpenVINO reports its import to its vendor where openvino_telemetry can be imported."""
    code = (
        "import sys; from pageflight.lowering import registry; assert 'openvino' not in sys.modules;"
        "registry.get('openvino');"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules;"
        "assert not [m for m in sys.modules if m.startswith('openvino_telemetry.')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
