"""`pageflight build --engine tensorrt` from end to end, without a GPU."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pageflight.core.errors import ConfigError, ManifestMismatch
from pageflight.core.manifest import EngineManifest
from pageflight.lowering import registry
from pageflight.lowering.tensorrt_plan import EnginePlan
from pageflight.models.safetensors_file import SafetensorsFile
from pageflight_build.options import BuildOptions, EngineOptions, ServingOptions
from pageflight_build.recipe import build

ENGINE = EngineOptions(engine="tensorrt", dtype="fp8", compute_capability=(89, 120), max_model_len=64)
SERVING = ServingOptions(max_num_seqs=4, max_num_tokens=32)


def options(checkpoint: Path, repository: Path, engine: EngineOptions = ENGINE, **serving: int | bool) -> BuildOptions:
    return BuildOptions(
        checkpoint=checkpoint,
        repository=repository,
        name="tiny",
        engine=engine,
        serving=replace(SERVING, **serving),  # type: ignore[arg-type]
    )


def test_engines_their_plan_and_the_manifest_are_written(checkpoint: Path, tmp_path: Path) -> None:
    """Everything that a program with a GPU needs is in the folder, and the manifest answers for every file."""
    result = build(options(checkpoint, tmp_path / "repo"))
    manifest, plan = EngineManifest.read(result.engine_dir), EnginePlan.read(result.engine_dir)
    assert (manifest.lowering, manifest.dtype, manifest.kv_dtype) == ("tensorrt", "fp8", "bf16")
    assert manifest.fingerprint["compute_capabilities"] == "89,120" and manifest.fingerprint["activations"] == "bf16"
    assert "tensorrt_rtx" in manifest.fingerprint
    assert [segment.name for segment in plan.segments] == ["first", "mid", "last"]
    recorded = {record.path: record.num_bytes for record in manifest.files}
    assert {segment.file: segment.num_bytes for segment in plan.segments}.items() <= recorded.items()
    assert "segments.json" in recorded
    assert plan.profiles[-1].max_tokens == 32 and plan.profiles[-2].max_tokens == 4


def test_the_plan_names_every_weight_once(checkpoint: Path, tmp_path: Path) -> None:
    """A layer's norm was bound to its neighbour's input."""
    result = build(options(checkpoint, tmp_path / "repo"))
    plan = EnginePlan.read(result.engine_dir)
    bound = [tensor for run in plan.runs for tensor in run.weights.values()]
    assert sorted(bound) == sorted(SafetensorsFile(result.engine_dir / "model.safetensors").records)
    first, mid, last = plan.runs
    assert (first.attention, mid.attention, last.attention) == (0, 1, -1)
    assert mid.weights["this.output"] == "layers.0.output" and mid.weights["next.qkv"] == "layers.1.qkv"
    assert mid.buffers["residual"] != mid.buffers["next_residual"]
    assert (first.buffers["next_residual"], mid.buffers["next_residual"]) == (
        mid.buffers["residual"],
        last.buffers["residual"],
    )


def test_constant_weights_make_an_engine_of_every_layer(checkpoint: Path, tmp_path: Path) -> None:
    """Engines with weights in them cannot be shared."""
    outside = EnginePlan.read(build(options(checkpoint, tmp_path / "outside")).engine_dir)
    engine = replace(ENGINE, weights="constant", dtype="bf16")
    inside = EnginePlan.read(build(options(checkpoint, tmp_path / "inside", engine)).engine_dir)
    assert [segment.name for segment in inside.segments] == ["first", "mid1", "last"]
    assert not any(spec.kind in ("weight", "table") for segment in inside.segments for spec in segment.inputs)
    assert any(spec.kind == "weight" for segment in outside.segments for spec in segment.inputs)
    assert [run.segment for run in inside.runs] == ["first", "mid1", "last"]


@pytest.mark.parametrize("changed", ["nothing", "queue", "batch", "capability", "weights"])
def test_what_is_unchanged_is_reused(checkpoint: Path, tmp_path: Path, changed: str) -> None:
    """Every start built all engines again."""
    repository = tmp_path / "repo"
    first = build(options(checkpoint, repository))
    inode = (first.engine_dir / "segments" / "mid.engine").stat().st_ino
    engine, serving = ENGINE, {}
    if changed == "queue":
        serving = {"max_queue_size": 7}
    elif changed == "batch":
        serving = {"max_num_seqs": 8}
    elif changed == "capability":
        engine = replace(ENGINE, compute_capability=(89,))
    elif changed == "weights":
        tensors = load_file(checkpoint / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1.5)
        save_file(tensors, checkpoint / "model.safetensors")
    second = build(options(checkpoint, repository, engine, **serving))
    kept = (second.engine_dir / "segments" / "mid.engine").stat().st_ino == inode
    assert kept == (changed in ("nothing", "queue"))
    assert second.reused == (changed == "nothing")
    if second.reused:
        assert second.seconds < 5


def test_without_a_gpu_loading_says_so(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first words were about CUDA error 35, in a traceback."""
    result = build(options(checkpoint, tmp_path / "repo"))
    monkeypatch.setattr("ctypes.CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU and its driver, and there is none here"):
        registry.get("tensorrt").load(result.engine_dir, num_threads=1)
    (result.engine_dir / "segments.json").unlink()
    with pytest.raises(ManifestMismatch, match=r"segments\.json is missing"):
        registry.get("tensorrt").load(result.engine_dir, num_threads=1)


@pytest.mark.parametrize(
    ("engine", "serving", "says"),
    [
        (replace(ENGINE, compute_capability=(90,)), {}, "compute_capability=90"),
        (replace(ENGINE, kv_dtype="fp32"), {}, "kv_dtype='fp32'"),
        (
            replace(ENGINE, dtype="bf16", kv_dtype="fp8", compute_capability=(86, 89)),
            {},
            "=86: kv_dtype fp8 needs 89",
        ),
        (replace(ENGINE, flavor="full", compute_capability=()), {}, "flavor='full' needs the package tensorrt"),
        (ENGINE, {"deterministic": True}, "deterministic=True"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: EngineOptions,
    serving: dict[str, bool],
    says: str,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ConfigError, match=says):
        build(options(checkpoint, tmp_path / "repo", engine, **serving))
    assert not (tmp_path / "repo").exists()


def test_the_default_precision_is_one_for_gpus(checkpoint: Path, tmp_path: Path) -> None:
    """It was fp32, because the CPU that built it has no bf16."""
    engine = EngineOptions(engine="tensorrt", max_model_len=64)
    result = build(options(checkpoint, tmp_path / "repo", engine))
    assert (result.manifest.dtype, result.manifest.fingerprint["compute_capabilities"]) == ("bf16", "any")
    plan = json.loads((result.engine_dir / "segments.json").read_text())
    assert plan["compute_capabilities"] == []
