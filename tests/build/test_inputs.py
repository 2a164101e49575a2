"""Where checkpoints come from, what stands beside their weights, and what the machine decides."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pageflight.core.errors import CheckpointError, ConfigError
from pageflight.lowering import registry, tensorrt_target
from pageflight.models.config import DecoderConfig
from pageflight.models.families import read_config
from pageflight.quant import forms
from pageflight_build import options
from pageflight_build.checkpoint_files import copy_text_files, read_text_facts
from pageflight_build.engine import resolve_engine_options
from pageflight_build.inputs import engine_inputs
from pageflight_build.machine import cpu_flags, default_dtype
from pageflight_build.options import BuildOptions, EngineOptions, ServingOptions
from pageflight_build.recipe import build
from pageflight_build.source import default_name, resolve_checkpoint

from .conftest import write_checkpoint


class Hub:
    """Stands in for huggingface_hub.snapshot_download."""

    def __init__(self, folder: Path | None, *, cached: bool, reason: str = "offline") -> None:
        self.folder, self.cached, self.reason = folder, cached, reason
        self.asked: list[tuple[str, str | None, bool]] = []

    def __call__(
        self, name: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool = False
    ) -> str:
        self.asked.append((name, revision, local_files_only))
        assert not any("bin" in pattern for pattern in allow_patterns)
        if self.folder is None or (local_files_only and not self.cached):
            raise OSError(self.reason)
        return str(self.folder)


def test_a_hub_id_is_found_in_the_cache_without_network(checkpoint: Path) -> None:
    """Every start asked the hub whether the model was still the same, and failed in the train."""
    hub = Hub(checkpoint, cached=True)
    assert resolve_checkpoint("owner/name@v2", fetch=hub) == checkpoint
    assert hub.asked == [("owner/name", "v2", True)]


def test_what_is_not_cached_is_fetched(checkpoint: Path) -> None:
    """An id that had never been used before was called missing."""
    hub = Hub(checkpoint, cached=False)
    assert resolve_checkpoint("owner/name", fetch=hub) == checkpoint
    assert [local for _, _, local in hub.asked] == [True, False]


def test_an_id_that_cannot_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty lines of traceback from the HTTP library."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(CheckpointError, match=r"owner/name could not be fetched .*\(no route\).*copy the folder here"):
        resolve_checkpoint("owner/name", fetch=Hub(None, cached=False, reason="no route"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        resolve_checkpoint("owner/name", fetch=Hub(None, cached=False))


@pytest.mark.parametrize("wanted", ["./nothing", "/nothing/here", "just-a-name", "a/b/c"])
def test_a_missing_folder_is_not_taken_for_a_hub_id(wanted: str) -> None:
    """A typing error in a path became a download."""
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_checkpoint(wanted, fetch=Hub(None, cached=False))


@pytest.mark.parametrize(
    ("wanted", "name"),
    [("owner/Llama-3.2-1B@main", "Llama-3.2-1B"), ("./my model/", "my-model"), ("/x/tiny", "tiny"), ("///", "model")],
)
def test_the_default_name_can_be_a_models_name(wanted: str, name: str) -> None:
    """A blank in a folder's name made a URL that no client could write."""
    assert default_name(wanted) == name


def test_the_inputs_change_with_what_matters_only(checkpoint: Path) -> None:
    """A new README of the checkpoint converted 140 GB again."""
    options = EngineOptions(dtype="fp32")
    before = engine_inputs(checkpoint, options, ServingOptions())
    (checkpoint / "README.md").write_text("new")
    assert engine_inputs(checkpoint, options, ServingOptions()) == before
    assert engine_inputs(checkpoint, EngineOptions(dtype="bf16"), ServingOptions()) != before
    (checkpoint / "generation_config.json").write_text("{}")
    assert engine_inputs(checkpoint, options, ServingOptions()) != before


def test_text_facts_come_from_the_checkpoint(checkpoint: Path) -> None:
    """Generation ran on, because the second end-of-sequence token stood in another file."""
    (checkpoint / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [5, 7], "do_sample": True, "temperature": 0.6, "top_p": 0.9})
    )
    facts = read_text_facts(checkpoint, read_config(checkpoint))
    assert facts.eos_token_ids == (5, 7, 1)
    assert facts.generation == {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    assert (facts.bos_token_id, facts.add_bos, facts.has_chat_template) == (0, False, False)


@pytest.mark.parametrize("entry", [{"temperature": "hot"}, {"top_p": -1}, {"eos_token_id": 10**6}, {"do_sample": 1}])
def test_generation_defaults_are_checked(checkpoint: Path, entry: dict[str, object]) -> None:
    """A default of -1 was found out by the first request, which was not to blame."""
    (checkpoint / "generation_config.json").write_text(json.dumps(entry))
    with pytest.raises(CheckpointError, match=next(iter(entry))):
        read_text_facts(checkpoint, read_config(checkpoint))


@pytest.mark.parametrize("damage", ["missing", "no JSON"])
def test_a_tokenizer_that_cannot_be_read_is_refused(checkpoint: Path, damage: str) -> None:
    """The error of the library was a bare Exception about line 1, column 1."""
    path = checkpoint / "tokenizer.json"
    path.unlink()
    if damage == "no JSON":
        path.write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        read_text_facts(checkpoint, read_config(checkpoint))


def test_templates_are_carried_over(checkpoint: Path, tmp_path: Path) -> None:
    """The chat template stayed behind, and chat with it."""
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    copy_text_files(checkpoint, tmp_path / "tokenizer")
    copied = {str(path.relative_to(tmp_path / "tokenizer")) for path in (tmp_path / "tokenizer").rglob("*.jinja")}
    assert copied == {"chat_template.jinja", os.path.join("additional_chat_templates", "tool_use.jinja")}


def test_the_options_are_what_the_lowerings_know() -> None:
    """The command line offered a precision that no one converts to."""
    assert options.DTYPES == forms.DTYPES and options.GROUPED_DTYPES == forms.GROUPED_DTYPES
    assert options.ENGINES == registry.NAMES
    assert (options.FLAVORS, options.WEIGHTS) == (tensorrt_target.FLAVORS, tensorrt_target.WEIGHTS)


def config_of(folder: Path, **changes: int) -> DecoderConfig:
    return read_config(write_checkpoint(folder, **changes))


def test_groups_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    """--group-size 64 was dropped in silence where dtype turned out to be bf16."""
    config = config_of(tmp_path / "a")
    with pytest.raises(ConfigError, match="group_size=48"):
        build(
            BuildOptions(
                checkpoint=tmp_path / "a",
                repository=tmp_path / "repo",
                name="x",
                engine=EngineOptions(dtype="int8", group_size=48),
            )
        )
    options = EngineOptions(group_size=32)
    with pytest.raises(ConfigError, match="group_size=32: only dtypes int8 and int4"):
        resolve_engine_options(options, config, registry.get("openvino"))


def test_a_length_beyond_the_model_is_refused(tmp_path: Path) -> None:
    """Rotary tables past the trained length give fluent nonsense."""
    config = config_of(tmp_path / "a")
    lowering = registry.get("openvino")
    with pytest.raises(ConfigError, match="max_model_len=257: the model was made for 256"):
        resolve_engine_options(EngineOptions(dtype="fp32", max_model_len=257), config, lowering)
    assert resolve_engine_options(EngineOptions(dtype="fp32"), config, lowering).max_model_len == 256


@pytest.mark.parametrize(
    ("flags", "dtype"), [("fpu avx512f avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("fpu avx2", "fp32")]
)
def test_bf16_is_the_default_where_the_cpu_has_it(tmp_path: Path, flags: str, dtype: str) -> None:
    """Emulated bf16 was four times slower than fp32."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: other\n")
    assert default_dtype(cpu_flags(cpuinfo)) == dtype
    assert default_dtype(cpu_flags(tmp_path / "absent")) == "fp32"
