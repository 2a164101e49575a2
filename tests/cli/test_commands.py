"""The `pageflight` command without a server: help, errors, exit status, options that reach what they name."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from pageflight.cli.build_flags import BuildFlags
from pageflight.cli.inspect_repository import damaged
from pageflight.cli.main import main
from pageflight.cli.sampling_flags import SamplingFlags
from pageflight.core.errors import ConfigError
from pageflight.core.manifest import EngineManifest, FileRecord
from pageflight_build.amounts import parse_bytes, parse_capabilities
from pageflight_build.options import BuildOptions, EngineOptions, ServingOptions

COMMANDS = ("build", "serve", "up", "generate", "chat", "plan", "inspect", "replay")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_explains_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Options alone tell nobody where to begin."""
    assert main([command, "--help"] if command else ["--help"]) == 0
    shown = capsys.readouterr().out
    assert f"pageflight {command}".strip() in shown
    assert "Example" in shown or "pageflight build ./my-model" in shown


@pytest.mark.parametrize(
    "arguments", [["bulid"], ["build"], ["build", "x", "--dtpye", "fp32"], ["serve", "x", "--http-port", "http"]]
)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts could not tell a typing error from a failure."""
    assert main(arguments) == 2
    assert "Usage: pageflight" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["build", "./no/such/folder"], "does not exist"),
        (["serve", "./no/such/repository"], "no model repository"),
        (["inspect", "./no/such/repository"], "holds no engine"),
        (["generate", "x", "--url", "localhost:8000"], "write http://HOST:PORT"),
        (["generate", "x", "-p", "temperature"], "write NAME=VALUE"),
        (["generate", "x", "--url", "http://localhost:9"], "start a server"),
        (["generate", "x", "--record", "run.rec"], "they need --local"),
        (["replay", "./no/such.rec"], "No such file"),
        (["replay", __file__], "is no recording"),
    ],
)
def test_an_error_is_one_line_that_says_what_to_do(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tracebacks frighten people and hide the one line that would have helped."""
    assert main(arguments) == 1
    shown = capsys.readouterr().err
    assert says in shown and "Traceback" not in shown
    assert shown.count("\n") == 1


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    """A bug report without a traceback is a riddle."""
    assert main(["--debug", "inspect", "./no/such/repository"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_every_build_option_reaches_the_build(tmp_path: Path) -> None:
    """--max-queue-size was parsed, printed in the help, and dropped."""
    given: dict[str, Any] = {
        "name": "other",
        "engine": "tensorrt",
        "dtype": "int8",
        "group_size": 32,
        "kv_dtype": "u8",
        "max_model_len": 77,
        "flavor": "full",
        "compute_capability": "12.0,89",
        "weights": "constant",
        "collectives": "inside",
        "kv_memory": "3MiB",
        "host_kv_memory": "2GiB",
        "max_num_seqs": 5,
        "max_num_tokens": 6,
        "max_queue_size": 7,
        "max_queue_tokens": 10,
        "scheduling_policy": "fair",
        "ageing_s": 11.0,
        "tenants": tmp_path / "tenants.json",
        "kv_admission": "reserve",
        "gpu_memory_utilization": 0.75,
        "kv_watermark": 0.5,
        "target_inter_token_ms": 12.0,
        "hang_limit_s": 11,
        "instances": "cpu:0; cpu:1 dtype=int8",
        "session_affinity": "prefix",
        "reroute_after_s": 3.5,
        "threads": 3,
        "tensor_parallel": 4,
        "pipeline_parallel": 3,
        "launcher": "external",
        "nodes": 2,
        "rank_port": 4000,
        "rank_wait_s": 7.5,
        "ray_address": "10.0.0.1:6379",
        "prefix_cache": False,
        "deterministic": True,
        "default_max_tokens": 8,
        "response_rate": 9,
        "exclude_input_in_output": False,
        "engine_name": "tensorrt_llm",
        "default": True,
        "force": True,
    }
    (tmp_path / "tenants.json").write_text("{}")
    assert set(given) == {field.name for field in fields(BuildFlags)}
    options = BuildFlags(**given).options(str(tmp_path), tmp_path / "repo")
    defaults = BuildOptions(checkpoint=tmp_path, repository=tmp_path, name="x")
    for group, reference in ((options.engine, defaults.engine), (options.serving, defaults.serving)):
        for field in fields(group):
            assert getattr(group, field.name) != getattr(reference, field.name), field.name
    assert options.serving.kv_memory == 3 * 1024**2 and options.serving.tenants == str(tmp_path / "tenants.json")
    assert options.engine.compute_capability == (89, 120)
    assert (options.name, options.default, options.force) == ("other", True, True)


def test_every_sampling_option_is_sent_only_when_given() -> None:
    """Sending a default of the client overruled the checkpoint's own."""
    assert SamplingFlags().request("hi") == {"text_input": "hi"}
    flags = SamplingFlags(
        max_tokens=1, temperature=0.5, top_k=2, top_p=0.9, min_p=0.1, seed=3, stop=["a", "b"], param=["x=1", "y=text"]
    )
    assert flags.request("hi") == {
        "text_input": "hi", "max_tokens": 1, "temperature": 0.5, "top_k": 2, "top_p": 0.9, "min_p": 0.1, "seed": 3,
        "stop_words": ["a", "b"], "x": 1, "y": "text",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("0", 0), ("4GiB", 4 << 30), ("1.5 MiB", 3 << 19), ("2GB", 2 * 10**9), ("3e9", 3 * 10**9)]
)
def test_amounts_of_memory_are_read_with_their_unit(text: str, num_bytes: int) -> None:
    """4G was four bytes."""
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "4 gigabytes", "nan"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    """A negative cache was allocated as the default one."""
    with pytest.raises(ConfigError, match="amount of memory"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "fp4"},
        {"engine": "cuda"},
        {"engine": "tensorrt", "flavor": "lean"},
        {"engine": "tensorrt", "weights": "outside"},
        {"flavor": "full"},
        {"compute_capability": (89,)},
        {"weights": "constant"},
        {"collectives": "inside"},
        {"engine": "tensorrt", "collectives": "around"},
        {"kv_dtype": "int4"},
        {"group_size": -2},
        {"max_model_len": -1},
        {"dtype": "bf16", "group_size": 64},
    ],
)
def test_engine_options_out_of_range_are_refused_by_name(changes: dict[str, Any]) -> None:
    """The build ran for ten minutes before it noticed."""
    with pytest.raises(ConfigError, match=next(reversed(changes))):
        EngineOptions(**changes)


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ({}, 256),
        ({"max_num_seqs": 300}, 300),
        ({"engine": "torch"}, 2048),
        ({"engine": "tensorrt", "max_num_tokens": 512}, 512),
    ],
)
def test_a_step_is_as_large_as_suits_the_engine(given: dict[str, Any], tokens: int, tmp_path: Path) -> None:
    """A GPU got steps of 256 tokens, with which it waits for its memory."""
    options = BuildFlags(name="x", **given).options(str(tmp_path), tmp_path / "repo")
    assert options.serving.max_num_tokens == tokens


@pytest.mark.parametrize("text", ["8", "sm_89", "89;120", "8.9.0.0"])
def test_what_is_no_compute_capability_is_refused(text: str) -> None:
    """sm_89 was taken for no choice at all."""
    with pytest.raises(ConfigError, match=f"compute_capability='{text}'"):
        parse_capabilities(text)


@pytest.mark.parametrize(
    "name",
    [
        "max_num_seqs",
        "max_num_tokens",
        "max_queue_size",
        "hang_limit_s",
        "tensor_parallel",
        "pipeline_parallel",
        "default_max_tokens",
    ],
)
def test_serving_options_out_of_range_are_refused_by_name(name: str) -> None:
    """A server with 0 sequences starts, and answers nobody."""
    with pytest.raises(ConfigError, match=name):
        ServingOptions(**{name: 0})


def test_a_tenants_file_with_a_mistake_ends_the_build(tmp_path: Path) -> None:
    """The server found it at start, ten minutes later."""
    (tmp_path / "tenants.json").write_text('{"default": {"weight": -1}}')
    with pytest.raises(ConfigError, match=r"tenants\.json: default\.weight=-1"):
        BuildFlags(name="x", tenants=tmp_path / "tenants.json").options(str(tmp_path), tmp_path / "repo")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "ensemble", "a" * 200, "engine"])
def test_names_that_cannot_be_models_are_refused(name: str, tmp_path: Path) -> None:
    """--name ../other wrote into somebody else's repository."""
    with pytest.raises(ConfigError, match="name"):
        BuildOptions(checkpoint=tmp_path, repository=tmp_path, name=name)


def test_inspect_notices_a_changed_file(tmp_path: Path) -> None:
    """A flipped bit in the weights gives fluent nonsense."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    digest = "9e1f8e3bb2ea7f6b5e8d0f7a4e8d4b0d4e3c7c3a1f2b9d8e7f6a5b4c3d2e1f00"
    manifest = EngineManifest(
        name="x", family="llama", lowering="openvino", dtype="fp32", kv_dtype="fp32", block_size=32, max_model_len=8,
        vocab_size=8, model={}, fingerprint={},
        files=(FileRecord(path="model.safetensors", num_bytes=7, sha256=digest),),
    )  # fmt: skip
    assert damaged(tmp_path, manifest) == [f"{tmp_path / 'model.safetensors'} was changed after the build"]
    missing = replace(manifest, files=(FileRecord(path="gone", num_bytes=1, sha256=digest),))
    assert damaged(tmp_path, missing) == [f"{tmp_path / 'gone'} is missing"]


def test_the_command_starts_without_the_heavy_libraries() -> None:
    """`pageflight --help` took four seconds, three of them to import OpenVINO and torch."""
    code = (
        "import sys, json; from pageflight.cli.main import main; main(['--version']);"
        "print(json.dumps([m for m in ('openvino', 'torch', 'tritonclient.grpc', 'transformers') if m in sys.modules]))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(shown.splitlines()[-1]) == []
