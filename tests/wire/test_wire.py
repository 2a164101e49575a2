from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path, PurePosixPath

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from pageflight.core import wire
from pageflight.core.errors import ConfigError
from pageflight_build.triton_config import (
    TEMPLATE_NAME,
    Deployment,
    engine_model_name,
    model_configs,
    model_names,
    repository_files,
    write_repository,
)

ROOT = Path(__file__).resolve().parents[2]
TABLES = {
    "text": (wire.TEXT_INPUTS, wire.TEXT_OUTPUTS),
    "engine": (wire.ENGINE_INPUTS, wire.ENGINE_OUTPUTS),
    "preprocessing": (wire.PREPROCESSING_INPUTS, wire.PREPROCESSING_OUTPUTS),
    "postprocessing": (wire.POSTPROCESSING_INPUTS, wire.POSTPROCESSING_OUTPUTS),
}


@pytest.mark.parametrize("table", TABLES)
def test_no_tensor_is_listed_twice(table: str) -> None:
    for tensors in TABLES[table]:
        assert max(Counter(tensor.name for tensor in tensors).values()) == 1


@pytest.mark.parametrize("table", TABLES)
def test_tensors_have_the_type_of_the_option_they_carry(table: str) -> None:
    """`seed` was declared INT64 on one model and UINT64 on another."""
    for tensor in TABLES[table][0]:
        if tensor.option:
            option = wire.OPTIONS[tensor.option]
            assert (tensor.dtype, tensor.dims) == (option.dtype, option.dims), tensor.name


def test_every_option_can_be_sent_to_both_kinds_of_model() -> None:
    parameters_only = {"stop_token_ids", "skip_special_tokens"}
    for tensors in (wire.TEXT_INPUTS, wire.ENGINE_INPUTS):
        assert {tensor.option for tensor in tensors if tensor.option} == set(wire.OPTIONS) - parameters_only


def test_aliases_lead_to_options() -> None:
    assert not set(wire.ALIASES) & set(wire.OPTIONS)
    assert set(wire.ALIASES.values()) <= set(wire.OPTIONS)


def test_return_options_name_real_outputs() -> None:
    outputs = {tensor.name for tensor in wire.TEXT_OUTPUTS}
    for option, names in wire.RETURN_OPTIONS.items():
        assert option in wire.OPTIONS
        assert set(names) <= outputs


def test_limits_can_be_read_for_every_option() -> None:
    for option in wire.OPTIONS.values():
        assert option.limit.startswith("must be")
        assert option.meaning


def test_wire_imports_the_standard_library_and_what_requests_are_only() -> None:
    tree = ast.parse((ROOT / "engine_src/pageflight/core/wire.py").read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= {"__future__", "dataclasses", "typing", "pageflight.core.request"}


def test_committed_model_repository_is_what_the_generator_writes() -> None:
    """Run `python -m pageflight_build.triton_config model_repository` after a change of the tables."""
    files = repository_files(Deployment(name=TEMPLATE_NAME))
    committed = {
        PurePosixPath(path.relative_to(ROOT / "model_repository").as_posix())
        for path in (ROOT / "model_repository").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert committed == set(files)
    for path, content in files.items():
        assert (ROOT / "model_repository" / path).read_text(encoding="utf-8") == content, path


def test_configs_survive_their_text_form() -> None:
    for path, content in repository_files(Deployment(name="m")).items():
        if path.name == "config.pbtxt":
            parsed = text_format.Parse(content, model_config_pb2.ModelConfig())
            assert parsed == model_configs(Deployment(name="m"))[path.parts[0]]


def test_only_streaming_models_are_decoupled() -> None:
    names = model_names(Deployment(name="m"))
    decoupled = {n for n, c in model_configs(Deployment(name="m")).items() if c.model_transaction_policy.decoupled}
    assert decoupled == {names["engine"], names["text"]}


def test_ensemble_maps_every_input_and_output_to_a_tensor_of_its_steps() -> None:
    """An ensemble input that no step takes keeps the server from loading it."""
    config = model_configs(Deployment(name="m"))["ensemble"]
    steps = {"preprocessing": TABLES["preprocessing"], "engine": TABLES["engine"]}
    taken, made = set(), set()
    for step in config.ensemble_scheduling.step:
        inputs, outputs = steps[step.model_name]
        assert set(step.input_map) <= {tensor.name for tensor in inputs}
        assert set(step.output_map) <= {tensor.name for tensor in outputs}
        taken |= set(step.input_map.values())
        made |= set(step.output_map.values())
    assert {tensor.name for tensor in config.input} <= taken
    assert {tensor.name for tensor in config.output} <= made


def test_several_checkpoints_share_a_repository_without_a_clash() -> None:
    one = Deployment(name="one", prefixed=True, is_default=True)
    two = Deployment(name="two", prefixed=True, is_default=False)
    names = [*model_names(one).values(), *model_names(two).values()]
    assert len(set(names)) == len(names)
    assert model_names(one)["ensemble"] == "ensemble"
    assert model_names(two)["ensemble"] == "two_ensemble"
    assert engine_model_name(two) == "two_engine"


def test_engine_can_have_the_name_that_its_clients_know() -> None:
    deployment = Deployment(name="m", engine_name="tensorrt_llm")
    configs = model_configs(deployment)
    assert "tensorrt_llm" in configs
    assert configs["m"].parameters["engine_model"].string_value == "tensorrt_llm"
    assert configs["ensemble"].ensemble_scheduling.step[1].model_name == "tensorrt_llm"
    assert configs["preprocessing"].parameters["engine_dir"].string_value == "tensorrt_llm/1/artifacts"


@pytest.mark.parametrize("name", ["engine", "ensemble", "preprocessing"])
def test_two_models_of_one_name_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Deployment(name=name)


def test_no_instances_are_refused() -> None:
    with pytest.raises(ConfigError, match="instances=0"):
        Deployment(name="m", instances=0)


def test_written_repository_leaves_the_engine_alone(tmp_path: Path) -> None:
    artifacts = tmp_path / "engine" / "1" / "artifacts"
    artifacts.mkdir(parents=True)
    (artifacts / "manifest.json").write_text("{}")
    written = write_repository(tmp_path, Deployment(name="m", instances=3))
    assert (artifacts / "manifest.json").read_text() == "{}"
    assert all(path.is_file() for path in written)
    assert (tmp_path / "ensemble" / "1").is_dir()
    text = (tmp_path / "m" / "config.pbtxt").read_text()
    assert text_format.Parse(text, model_config_pb2.ModelConfig()).instance_group[0].count == 3
