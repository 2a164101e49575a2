"""`pageflight build` from end to end on a tiny checkpoint, with OpenVINO."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pageflight.core.errors import CheckpointError, ConfigError
from pageflight.core.manifest import EngineManifest
from pageflight.lowering import registry
from pageflight.models.checkpoint import open_checkpoint
from pageflight_build import recipe, swap
from pageflight_build.options import BuildOptions, EngineOptions, ServingOptions
from pageflight_build.progress import StageReport
from pageflight_build.recipe import build
from pageflight_build.record import RECORD_NAME, file_digest
from pageflight_build.reference import reference_logits

from .conftest import CONFIG, write_checkpoint


def options(checkpoint: Path, repository: Path, name: str = "tiny", **changes: object) -> BuildOptions:
    made = BuildOptions(checkpoint=checkpoint, repository=repository, name=name, engine=EngineOptions(dtype="fp32"))
    return replace(made, **changes)  # type: ignore[arg-type]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Recorded:
    """Progress that keeps the stages it saw."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    @contextmanager
    def stage(self, title: str) -> Iterator[StageReport]:
        self.stages.append(title)
        yield self

    def advance(self, done: int, total: int) -> None:
        assert 0 <= done <= total

    def done(self, title: str, summary: str) -> None:
        assert summary


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "group_size"),
    [("fp32", "fp32", 0), ("bf16", None, 0), ("int8", "u8", 0), ("int8", None, 32), ("int4", None, 64)],
)
def test_a_built_engine_loads_and_says_what_it_is(
    checkpoint: Path, tmp_path: Path, dtype: str, kv_dtype: str | None, group_size: int
) -> None:
    """The manifest once named the block size of the options, not the one the loaded engine has."""
    engine = EngineOptions(dtype=dtype, kv_dtype=kv_dtype, group_size=group_size, max_model_len=128)
    result = build(options(checkpoint, tmp_path / "repo", engine=engine))
    manifest = EngineManifest.read(result.engine_dir)
    assert result.engine_dir == tmp_path / "repo" / "engine" / "1" / "artifacts"
    chosen = kv_dtype or registry.get(manifest.lowering).default_kv_dtype(dtype)
    assert (manifest.dtype, manifest.kv_dtype, manifest.max_model_len) == (dtype, chosen, 128)
    assert manifest.quant_group_size == group_size
    assert manifest.eos_token_ids == (1,)
    assert {"model.safetensors", "tokenizer/tokenizer.json"} <= {record.path for record in manifest.files}
    model = registry.get(manifest.lowering).load(result.engine_dir, num_threads=1)
    assert model.block_size == manifest.block_size > 1
    model.close()


@pytest.mark.parametrize(("dtype", "group_size"), [("fp16", 0), ("fp8", 0), ("int4", 64), ("int8", 0)])
def test_the_reference_engine_has_every_precision(
    checkpoint: Path, tmp_path: Path, dtype: str, group_size: int
) -> None:
    """What a GPU engine is compared with could not be built."""
    engine = EngineOptions(engine="torch", dtype=dtype)
    result = build(options(checkpoint, tmp_path / "repo", engine=engine))
    manifest = EngineManifest.read(result.engine_dir)
    assert (manifest.lowering, manifest.dtype, manifest.quant_group_size) == ("torch", dtype, group_size)
    assert manifest.kv_dtype == ("fp16" if dtype == "fp16" else "fp32")


def test_an_fp8_cache_is_for_gpus(checkpoint: Path, tmp_path: Path) -> None:
    """The reference has it too, so that the build can verify the engine; OpenVINO's attention has not."""
    result = build(options(checkpoint, tmp_path / "repo", engine=EngineOptions(engine="torch", kv_dtype="fp8")))
    assert EngineManifest.read(result.engine_dir).kv_dtype == "fp8"
    with pytest.raises(ConfigError, match="kv_dtype='fp8': supported with dtype 'bf16' here are"):
        build(options(checkpoint, tmp_path / "other", engine=EngineOptions(dtype="bf16", kv_dtype="fp8")))


@pytest.mark.parametrize("dtype", ["fp16", "fp8"])
def test_openvino_refuses_precisions_it_does_not_have(checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    """A precision that is emulated in silence is slower than none."""
    with pytest.raises(
        ConfigError, match=f"dtype='{dtype}': supported with engine openvino are fp32, bf16, int8, int4"
    ):
        build(options(checkpoint, tmp_path / "repo", engine=EngineOptions(dtype=dtype)))
    assert not (tmp_path / "repo").exists()


def test_the_second_build_of_the_same_changes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """A restart converted the weights again and made every start as slow as the first."""
    first = build(options(checkpoint, tmp_path / "repo"))
    before = {path: path.stat().st_ino for path in (tmp_path / "repo").rglob("*")}
    progress = Recorded()
    second = build(options(checkpoint, tmp_path / "repo"), progress)
    assert not first.reused and second.reused and progress.stages == []
    assert {path: path.stat().st_ino for path in (tmp_path / "repo").rglob("*")} == before


def test_a_repository_of_an_older_version_is_written_anew(checkpoint: Path, tmp_path: Path) -> None:
    """After an upgrade the server refused to load it: its files lacked a setting that the new version reads."""
    root = tmp_path / "repo"
    first = build(options(checkpoint, root))
    config, record_path = root / "engine" / "config.pbtxt", root / RECORD_NAME
    wanted, engine = config.read_text(), (first.engine_dir / "model.safetensors").stat().st_ino
    config.write_text(wanted.replace("default_max_tokens", "default_tokens"))
    record = json.loads(record_path.read_text())
    record["generated"]["engine/config.pbtxt"] = file_digest(config)
    record_path.write_text(json.dumps(record))
    second = build(options(checkpoint, root))
    assert config.read_text() == wanted
    assert (second.engine_dir / "model.safetensors").stat().st_ino == engine, "the engine itself is kept"


@pytest.mark.parametrize("changed", ["weights", "tokenizer", "dtype", "missing engine file"])
def test_another_input_is_built_again(checkpoint: Path, tmp_path: Path, changed: str) -> None:
    """An engine of older weights under a new name is the worst kind of wrong answer: a plausible one."""
    engine = EngineOptions(dtype="fp32")
    result = build(options(checkpoint, tmp_path / "repo", engine=engine))
    if changed == "weights":
        tensors = load_file(checkpoint / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1.5)
        save_file(tensors, checkpoint / "model.safetensors")
    elif changed == "tokenizer":
        config = json.loads((checkpoint / "tokenizer_config.json").read_text())
        (checkpoint / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages }}"}))
    elif changed == "dtype":
        engine = EngineOptions(dtype="bf16")
    else:
        (result.engine_dir / "model.safetensors").unlink()
    progress = Recorded()
    again = build(options(checkpoint, tmp_path / "repo", engine=engine), progress)
    assert not again.reused
    assert progress.stages == ["read", "convert", "describe", "verify", "assemble"]


def test_other_serving_options_keep_the_engine(checkpoint: Path, tmp_path: Path) -> None:
    """A larger queue is no reason to convert the weights again."""
    first = build(options(checkpoint, tmp_path / "repo"))
    inode = (first.engine_dir / "model.safetensors").stat().st_ino
    progress = Recorded()
    second = build(options(checkpoint, tmp_path / "repo", serving=ServingOptions(max_num_seqs=7)), progress)
    assert progress.stages == ["assemble"]
    assert (second.engine_dir / "model.safetensors").stat().st_ino == inode
    assert 'string_value: "7"' in (tmp_path / "repo" / "engine" / "config.pbtxt").read_text()


def test_ranks_that_do_not_work_are_refused_with_those_that_do(checkpoint: Path, tmp_path: Path) -> None:
    """The server found out at its start, hours of conversion later; or at a build that only changed settings."""
    engine, repository = EngineOptions(engine="torch", dtype="int8", group_size=32), tmp_path / "repo"

    def attempt(size: int, stages: int = 1, **changes: object) -> None:
        serving = ServingOptions(tensor_parallel=size, pipeline_parallel=stages)
        build(options(checkpoint, repository, **{"engine": engine, "serving": serving, **changes}))

    with pytest.raises(ConfigError, match=r"tensor_parallel=3: must divide num_heads=4; sizes that work are 1, 2, 4$"):
        attempt(3)
    with pytest.raises(ConfigError, match=r"pipeline_parallel=9: each stage needs a layer, num_layers=\d are here"):
        attempt(1, 9)
    assert not repository.exists()
    attempt(2, 2)
    config = (repository / "engine" / "config.pbtxt").read_text()
    for name in ("tensor_parallel", "pipeline_parallel"):
        assert re.search(rf'key: "{name}"\s+value {{\s+string_value: "2"', config)
    with pytest.raises(ConfigError, match="tensor_parallel=5"):  # the engine is there already
        attempt(5)
    with pytest.raises(
        ConfigError, match=r"tensor_parallel=2: engine openvino has no ranks: .* an instance, such as --instances"
    ):
        attempt(2, engine=EngineOptions(dtype="fp32"))
    with pytest.raises(ConfigError, match="pipeline_parallel=2: only engine torch runs in stages, not openvino"):
        attempt(1, 2, engine=EngineOptions(dtype="fp32"))
    for instances, message in (
        ("gpu0,1 tensor_parallel=1", "gpu0,1: tensor_parallel=1, but the set has 2 GPUs"),
        ("gpu0-2 pipeline_parallel=1 tensor_parallel=3", "tensor_parallel=3: must divide num_heads=4"),
        ("gpu0-8 tensor_parallel=1 pipeline_parallel=9", "pipeline_parallel=9: each stage needs a layer"),
    ):
        with pytest.raises(ConfigError, match=message):
            attempt(1, serving=ServingOptions(instances=instances))
    with pytest.raises(ConfigError, match="gpu0: pipeline_parallel=2, but the set has 1 GPU"):
        attempt(1, serving=ServingOptions(instances="gpu0", pipeline_parallel=2))


def test_a_deterministic_build_is_verified_once(checkpoint: Path, tmp_path: Path) -> None:
    """An engine that nobody had tried was served as deterministic, because its weights were there already."""
    plain = build(options(checkpoint, tmp_path / "repo"))
    assert not plain.manifest.deterministic
    wanted = ServingOptions(deterministic=True, threads=2)
    progress = Recorded()
    first = build(options(checkpoint, tmp_path / "repo", serving=wanted), progress)
    assert "verify" in progress.stages and first.manifest.deterministic
    progress = Recorded()
    build(options(checkpoint, tmp_path / "repo", serving=replace(wanted, max_num_seqs=7)), progress)
    assert progress.stages == ["assemble"]
    config = (tmp_path / "repo" / "engine" / "config.pbtxt").read_text()
    assert re.search(r'key: "deterministic"\s+value {\s+string_value: "true"', config)


def test_a_build_that_cannot_be_deterministic_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pageflight.lowering.company.Company.first_difference", lambda self, sizes: "a row differs")
    with pytest.raises(ConfigError, match=r"deterministic=True: .*lowering openvino.*a row differs"):
        build(options(checkpoint, tmp_path / "repo", serving=ServingOptions(deterministic=True)))
    assert not (tmp_path / "repo").exists()


def test_two_checkpoints_share_a_repository(tmp_path: Path) -> None:
    """The second one took the first one's model names, and its engine with them."""
    one, two = write_checkpoint(tmp_path / "one"), write_checkpoint(tmp_path / "two", seed=1)
    build(options(one, tmp_path / "repo", "one"))
    build(options(two, tmp_path / "repo", "two"))
    models = {path.parent.name for path in (tmp_path / "repo").glob("*/config.pbtxt")}
    assert {"one", "two", "one_engine", "two_engine", "one_preprocessing", "ensemble", "two_ensemble"} <= models
    assert "engine" not in models
    assert '"one_engine"' in (tmp_path / "repo" / "ensemble" / "config.pbtxt").read_text()
    engines = [EngineManifest.read(tmp_path / "repo" / f"{name}_engine/1/artifacts") for name in ("one", "two")]
    assert [engine.name for engine in engines] == ["one", "two"]
    assert engines[0].files[0].sha256 != engines[1].files[0].sha256

    build(options(two, tmp_path / "repo", "two", default=True))
    assert '"two_engine"' in (tmp_path / "repo" / "ensemble" / "config.pbtxt").read_text()
    assert build(options(one, tmp_path / "repo", "one")).reused


@pytest.mark.parametrize("stage", ["convert", "reference_logits", "put_in_place"])
def test_a_failed_build_leaves_the_repository_as_it_was(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """A full disk in the middle left a repository whose config named weights that were not there."""
    build(options(checkpoint, tmp_path / "repo"))
    before = tree(tmp_path / "repo")

    def fail(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(recipe, stage, fail)
    other = options(checkpoint, tmp_path / "repo", engine=EngineOptions(dtype="bf16"))
    with pytest.raises((ConfigError, OSError), match="No space left"):
        build(other)
    assert tree(tmp_path / "repo") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "repo"]


def test_leftovers_of_a_killed_build_are_removed(checkpoint: Path, tmp_path: Path) -> None:
    """Every kill -9 left another copy of the weights beside the repository."""
    (tmp_path / ".repo.0badcafe.building").mkdir()
    build(options(checkpoint, tmp_path / "repo"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "repo"]


def test_files_edited_by_hand_survive_until_force(checkpoint: Path, tmp_path: Path) -> None:
    """A rebuild threw away a tuned config.pbtxt without a word."""
    build(options(checkpoint, tmp_path / "repo"))
    config = tmp_path / "repo" / "engine" / "config.pbtxt"
    edited = config.read_text().replace('"10000"', '"5"')
    config.write_text(edited)
    assert build(options(checkpoint, tmp_path / "repo")).reused
    serving = ServingOptions(max_num_seqs=3)
    with pytest.raises(ConfigError, match=r"engine/config\.pbtxt.*--force"):
        build(options(checkpoint, tmp_path / "repo", serving=serving))
    assert config.read_text() == edited
    build(options(checkpoint, tmp_path / "repo", serving=serving, force=True))
    assert '"10000"' in config.read_text()


def test_a_folder_of_others_is_never_replaced(checkpoint: Path, tmp_path: Path) -> None:
    """`--repository ~ --force` must not be the last command of a home directory."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("four years")
    for force in (False, True):
        with pytest.raises(ConfigError, match=r"thesis\.txt"):
            build(options(checkpoint, home, force=force))
    assert (home / "thesis.txt").read_text() == "four years"


def test_a_foreign_model_repository_needs_force(checkpoint: Path, tmp_path: Path) -> None:
    """Someone else's Triton models are theirs, until they say otherwise."""
    foreign = tmp_path / "repo" / "resnet"
    foreign.mkdir(parents=True)
    (foreign / "config.pbtxt").write_text('name: "resnet"')
    with pytest.raises(ConfigError, match="--force"):
        build(options(checkpoint, tmp_path / "repo"))
    assert foreign.is_dir()
    build(options(checkpoint, tmp_path / "repo", force=True))
    assert not foreign.exists()


def test_names_that_clash_are_refused_before_anything_is_built(checkpoint: Path, tmp_path: Path) -> None:
    """Two models of one folder: Triton loads one of them, nobody knows which."""
    build(options(checkpoint, tmp_path / "repo", "a"))
    progress = Recorded()
    with pytest.raises(ConfigError, match="a_engine"):
        build(options(checkpoint, tmp_path / "repo", "a_engine"), progress)
    assert progress.stages == []


def test_wrong_weights_do_not_pass_verification(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Q and K swapped in the fused matrix: finite, fluent, wrong. Only a comparison with the checkpoint notices."""
    real = recipe.convert

    def swapped(*arguments: object, **named: object) -> object:
        converted = real(*arguments, **named)  # type: ignore[arg-type]
        tensors = load_file(converted.path)
        name = "layers.0.qkv"
        tensors[name] = np.ascontiguousarray(np.roll(tensors[name], 16, axis=0))
        save_file(tensors, converted.path, metadata={"format": "pageflight"})
        return converted

    monkeypatch.setattr(recipe, "convert", swapped)
    with pytest.raises(CheckpointError, match="not the checkpoint's"):
        build(options(checkpoint, tmp_path / "repo"))
    assert not (tmp_path / "repo").exists()


def test_the_exchange_falls_back_to_two_renames(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems do not know RENAME_EXCHANGE."""
    build(options(checkpoint, tmp_path / "repo"))
    monkeypatch.setattr(swap, "_exchange", lambda first, second: False)
    build(options(checkpoint, tmp_path / "repo", serving=ServingOptions(max_num_seqs=3)))
    assert 'string_value: "3"' in (tmp_path / "repo" / "engine" / "config.pbtxt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "repo"]


def test_a_repository_can_be_moved(checkpoint: Path, tmp_path: Path) -> None:
    """Absolute paths in config.pbtxt tied a repository to the machine that built it."""
    build(options(checkpoint, tmp_path / "repo"))
    assert str(tmp_path).encode() not in b"".join(
        content for path, content in tree(tmp_path / "repo").items() if path != "pageflight.json"
    )
    os.rename(tmp_path / "repo", tmp_path / "elsewhere")
    assert build(options(checkpoint, tmp_path / "elsewhere")).reused


def test_the_reference_is_the_model_of_transformers(checkpoint: Path) -> None:
    """What every engine is judged by must itself be right."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config, weights = open_checkpoint(checkpoint)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, vocab_size=config.vocab_size)).eval()
    tensors = load_file(checkpoint / "model.safetensors")
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    ids = list(range(2, 40))
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(reference_logits(weights, config, ids) - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"num_hidden_layers": 3}, "lacks tensors"),
        ({"vocab_size": 100}, "vocab_size|embed_tokens"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_a_checkpoint_that_cannot_be_served_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    """It was found out when the first request gave nonsense."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **changes)
    with pytest.raises(CheckpointError, match=message):
        build(options(checkpoint, tmp_path / "repo"))
    assert not (tmp_path / "repo").exists()


def test_damaged_weights_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    """A download that broke off at 90 % built without complaint."""
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        build(options(checkpoint, tmp_path / "repo"))


def test_a_pickle_checkpoint_is_never_opened(checkpoint: Path, tmp_path: Path) -> None:
    """Opening a pickle runs whatever its author wanted."""
    shutil.move(checkpoint / "model.safetensors", checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        build(options(checkpoint, tmp_path / "repo"))
