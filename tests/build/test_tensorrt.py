"""`pageflight build --engine tensorrt` from end to end, without a GPU."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tensorrt_rtx
from safetensors.numpy import load_file, save_file

from pageflight.cli.main import main
from pageflight.core.errors import ConfigError, ManifestMismatch
from pageflight.core.manifest import EngineManifest
from pageflight.lowering import registry, tensorrt_build, tensorrt_lowering
from pageflight.lowering.tensorrt_caches import TimingCache, read_cache, timing_path
from pageflight.lowering.tensorrt_gpu import Gpu
from pageflight.lowering.tensorrt_plan import EnginePlan
from pageflight.models.safetensors_file import SafetensorsFile
from pageflight_build.options import BuildOptions, EngineOptions, ServingOptions
from pageflight_build.recipe import build

ENGINE = EngineOptions(engine="tensorrt", dtype="fp8", compute_capability=(89,), max_model_len=64)
FULL = replace(ENGINE, flavor="full", dtype="bf16", compute_capability=())
SERVING = ServingOptions(max_num_seqs=4, max_num_tokens=32)


def options(
    checkpoint: Path, repository: Path, engine: EngineOptions = ENGINE, **serving: int | bool | str
) -> BuildOptions:
    return BuildOptions(
        checkpoint=checkpoint,
        repository=repository,
        name="tiny",
        engine=engine,
        serving=replace(SERVING, **serving),  # type: ignore[arg-type]
    )


def test_engines_their_plan_and_the_manifest_are_written(checkpoint: Path, tmp_path: Path) -> None:
    """Everything that a program with a GPU needs is in the folder, and the manifest answers for every file."""
    result = build(options(checkpoint, tmp_path / "repo", replace(ENGINE, compute_capability=(89, 120))))
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


@pytest.mark.parametrize(
    "changed", ["nothing", "queue", "batch", "capability", "form", "version", "flavor", "checkpoint"]
)
@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_what_is_unchanged_is_reused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
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
        engine = replace(ENGINE, compute_capability=(120,))
    elif changed == "form":
        engine = replace(ENGINE, weights="constant")
    elif changed == "version":
        monkeypatch.setattr(tensorrt_rtx, "__version__", "1.8.0.1")
    elif changed == "flavor":
        full_flavor(monkeypatch, tmp_path, "NVIDIA H200")
        engine = FULL
    elif changed == "checkpoint":
        tensors = load_file(checkpoint / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1.5)
        save_file(tensors, checkpoint / "model.safetensors")
    second = build(options(checkpoint, repository, engine, **serving))
    mid = second.engine_dir / "segments" / "mid.engine"
    kept = mid.exists() and mid.stat().st_ino == inode
    assert kept == (changed in ("nothing", "queue"))
    assert second.reused == (changed == "nothing")
    if second.reused:
        assert second.seconds < 5


def full_flavor(monkeypatch: pytest.MonkeyPatch, folder: Path, gpu_name: str | None) -> None:
    """`tensorrt` as if it were here: the same builder under the other name, beside a GPU that is only said to be."""
    package = ModuleType("tensorrt")
    package.__dict__.update({name: value for name, value in vars(tensorrt_rtx).items() if name != "__name__"})
    monkeypatch.setitem(sys.modules, "tensorrt", package)
    gpu = Gpu(name=gpu_name, capability=90, driver=13000) if gpu_name else None
    for module in (tensorrt_build, tensorrt_lowering):
        monkeypatch.setattr(module, "find_gpu", lambda: gpu)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "caches"))


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_the_full_flavor_keeps_its_timings_and_builds_anew_for_another_gpu(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It builds for the GPU it finds: a volume that moved to another card kept the old engines."""
    full_flavor(monkeypatch, tmp_path, "NVIDIA H200")
    given: list[bytes] = []
    right = TimingCache.attach

    def attach(cache: TimingCache, settings: object) -> None:
        given.append(cache.data)
        right(cache, settings)

    monkeypatch.setattr(TimingCache, "attach", attach)
    result = build(options(checkpoint, tmp_path / "repo", FULL))
    assert result.manifest.fingerprint["compute_capabilities"] == "90 of NVIDIA H200"
    assert "timing.cache" in {record.path for record in EngineManifest.read(result.engine_dir).files}
    gpu = Gpu(name="NVIDIA H200", capability=90, driver=0)
    kept = read_cache(timing_path("tensorrt", tensorrt_rtx.__version__, gpu))
    assert kept and kept == (result.engine_dir / "timing.cache").read_bytes()
    assert given == [b"", kept, kept]
    assert build(options(checkpoint, tmp_path / "repo", FULL)).reused
    full_flavor(monkeypatch, tmp_path, "NVIDIA B200")
    assert not build(options(checkpoint, tmp_path / "repo", FULL)).reused
    assert given[3] == b"", "the timings of the other card"
    full_flavor(monkeypatch, tmp_path, None)
    with pytest.raises(ConfigError, match="flavor='full' builds for the GPU of this machine, and there is none"):
        build(options(checkpoint, tmp_path / "elsewhere", FULL))


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
        (FULL, {}, "flavor='full' needs the package tensorrt"),
        (
            replace(ENGINE, dtype="bf16", kv_dtype="fp8", compute_capability=(86, 89)),
            {},
            "=86: kv_dtype fp8 needs 89",
        ),
        (ENGINE, {"deterministic": True}, "deterministic=True"),
        (ENGINE, {"tensor_parallel": 3}, "tensor_parallel=3: must divide num_heads=4; sizes that work are 1, 2, 4"),
        (ENGINE, {"pipeline_parallel": 2}, "pipeline_parallel=2: only engine torch runs in stages, not tensorrt"),
        (replace(ENGINE, collectives="inside"), {}, "collectives='inside': there is nothing to sum"),
        (
            replace(ENGINE, dtype="fp16", collectives="inside", compute_capability=(75, 89)),
            {"tensor_parallel": 2},
            "compute_capability=75: collectives inside engines need 80",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: EngineOptions,
    serving: dict[str, int | bool],
    says: str,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ConfigError, match=says):
        build(options(checkpoint, tmp_path / "repo", engine, **serving))
    assert not (tmp_path / "repo").exists()


def test_ranks_are_built_recorded_shown_and_found_again(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line, as people use it: a repository that says for how many ranks its engines are, a second build
    that does nothing, and another number of ranks, or other sums, that are not taken for the same engines."""
    repository = tmp_path / "repo"

    def run(*more: str) -> EngineManifest:
        arguments = [
            "build",
            str(checkpoint),
            "--repository",
            str(repository),
            "--name",
            "tiny",
            "--engine",
            "tensorrt",
        ]
        sizes = ["--compute-capability", "89", "--max-model-len", "64", "--max-num-seqs", "2", "--max-num-tokens", "8"]
        assert main([*arguments, *sizes, *more]) == 0
        return EngineManifest.read(repository / "engine" / "1" / "artifacts")

    manifest = run("--tensor-parallel", "2")
    folder = repository / "engine" / "1" / "artifacts"
    plan = EnginePlan.read(folder)
    assert (manifest.tensor_parallel, plan.tensor_parallel, plan.collectives) == (2, 2, "between")
    assert [run.segment for run in plan.runs] == [
        *("embed", "first", "output", "mlp", "mid", "last_output", "last_mlp", "last")
    ]
    assert [run.summed for run in plan.runs] == ["residual.0", "", "sum", "sum", "", "sum", "sum", ""]
    assert {segment.file for segment in plan.segments} < {record.path for record in manifest.files}
    config = (repository / "engine" / "config.pbtxt").read_text()
    assert re.search(r'key: "tensor_parallel"\s+value {\s+string_value: "2"', config)
    inode = (folder / "segments" / "mlp.engine").stat().st_ino
    assert run("--tensor-parallel", "2") == manifest and (folder / "segments" / "mlp.engine").stat().st_ino == inode
    capsys.readouterr()
    assert main(["inspect", str(repository)]) == 0
    shown = capsys.readouterr().out
    assert "2, each with its part of the weights" in shown and "collectives between" in shown
    inside = run("--tensor-parallel", "2", "--collectives", "inside")
    assert inside.tensor_parallel == 2 and [item.name for item in EnginePlan.read(folder).segments] == [
        *("first", "mid", "last")
    ]
    assert run().tensor_parallel == 1 and EnginePlan.read(folder).tensor_parallel == 1


def test_instances_with_other_numbers_of_ranks_have_engines_of_their_own(checkpoint: Path, tmp_path: Path) -> None:
    """Two GPUs as one instance and a third alone: the engines of the first were loaded by both."""
    result = build(options(checkpoint, tmp_path / "repo", ENGINE, instances="gpu0,1; gpu2"))
    folders = sorted((tmp_path / "repo" / "engine" / "1").glob("artifacts*"))
    assert [EngineManifest.read(folder).tensor_parallel for folder in folders] == [2, 1]
    assert result.manifest.tensor_parallel == 2
    assert build(options(checkpoint, tmp_path / "repo", ENGINE, instances="gpu0,1; gpu2")).reused


def test_a_package_without_sums_over_ranks_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was an attribute error, after the weights had been converted."""
    old = type("INetworkDefinition", (), {})
    monkeypatch.setattr(tensorrt_rtx, "INetworkDefinition", old)
    engine = replace(ENGINE, collectives="inside")
    with pytest.raises(ConfigError, match=r"collectives='inside': tensorrt_rtx 1\.\S+ has no add_dist_collective"):
        build(options(checkpoint, tmp_path / "repo", engine, tensor_parallel=2))


def test_the_default_precision_is_one_for_gpus(checkpoint: Path, tmp_path: Path) -> None:
    """It was fp32, because the CPU that built it has no bf16."""
    engine = EngineOptions(engine="tensorrt", max_model_len=64)
    result = build(options(checkpoint, tmp_path / "repo", engine))
    assert (result.manifest.dtype, result.manifest.fingerprint["compute_capabilities"]) == ("bf16", "any")
    plan = json.loads((result.engine_dir / "segments.json").read_text())
    assert plan["compute_capabilities"] == []
