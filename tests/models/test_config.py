"""What `config.json` says becomes a DecoderConfig, or is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pageflight.core.errors import CheckpointError, ManifestMismatch
from pageflight.models.config import DecoderConfig, RopeConfig
from pageflight.models.families import family_of, read_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "eos_token_id": 2,
    "bos_token_id": 1,
    "torch_dtype": "bfloat16",
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(folder: Path, **changes: Any) -> DecoderConfig:
    data = {key: value for key, value in {**LLAMA, **changes}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(data), encoding="utf-8")
    return read_config(folder)


def test_both_spellings_of_rope_give_the_same_config(tmp_path: Path) -> None:
    """transformers 5 moved rope_theta into rope_parameters; a reader of one spelling took the default theta."""
    old = read(tmp_path, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3})
    new = read(tmp_path, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    older = read(tmp_path, rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3})
    assert old == new == older
    assert old.rope == RopeConfig(
        theta=5e5, scaling="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )


def test_linear_scaling_and_the_default_are_read(tmp_path: Path) -> None:
    """A default type beside a theta is no scaling at all."""
    linear = read(tmp_path, rope_theta=1e6, rope_scaling={"type": "linear", "factor": 4})
    assert linear.rope == RopeConfig(theta=1e6, scaling="linear", factor=4.0)
    assert read(tmp_path, rope_theta=1e6, rope_scaling=None).rope == RopeConfig(theta=1e6)
    assert read(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 7.0}).rope == RopeConfig(theta=7.0)


def test_absent_entries_follow_from_the_others(tmp_path: Path) -> None:
    """Old checkpoints have neither head_dim nor key-value heads."""
    config = read(tmp_path, num_key_value_heads="absent", head_dim="absent")
    assert (config.num_kv_heads, config.head_dim) == (4, 16)
    assert read(tmp_path, head_dim=None).head_dim == 16
    assert read(tmp_path, head_dim=32).q_size == 128


def test_dtype_and_end_ids_are_read_in_every_form(tmp_path: Path) -> None:
    """Llama 3 lists three ends; a reader that took the first ran past the others."""
    assert read(tmp_path).checkpoint_dtype == "bfloat16"
    assert read(tmp_path, torch_dtype="absent", dtype="float16").checkpoint_dtype == "float16"
    assert read(tmp_path, eos_token_id=[2, 5, 9]).eos_token_ids == (2, 5, 9)
    assert read(tmp_path, eos_token_id=None).eos_token_ids == ()
    assert read(tmp_path, pad_token_id=-1).pad_token_id is None


def test_biases_and_tied_heads_are_read(tmp_path: Path) -> None:
    """attention_bias covers the output projection as well."""
    config = read(tmp_path, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias, config.tied_head) == (True, True, True, True)


def test_json_round_trip_gives_an_equal_config(tmp_path: Path) -> None:
    """Tuples became lists, and an engine refused its own manifest."""
    config = read(tmp_path, eos_token_id=[2, 5], rope_scaling={"rope_type": "llama3", **LLAMA3})
    assert DecoderConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("damage", [{"extra": 1}, {"rope": None}, {"rope": {"turns": 1}}])
def test_a_foreign_manifest_is_refused(tmp_path: Path, damage: dict[str, Any]) -> None:
    """Unknown entries mean another version wrote it."""
    with pytest.raises(ManifestMismatch):
        DecoderConfig.from_json({**read(tmp_path).to_json(), **damage})


REFUSED: list[tuple[str, Any]] = [
    ("architectures", ["GPT2LMHeadModel"]),
    ("architectures", None),
    ("architectures", "LlamaForCausalLM"),
    ("model_type", "mistral"),
    ("hidden_act", "gelu"),
    ("sliding_window", 4096),
    ("quantization_config", {"quant_method": "gptq"}),
    ("auto_map", {"AutoModelForCausalLM": "modeling.Mine"}),
    ("hidden_size", None),
    ("hidden_size", "64"),
    ("hidden_size", -64),
    ("num_hidden_layers", 0),
    ("vocab_size", True),
    ("num_attention_heads", 3),
    ("num_key_value_heads", 3),
    ("head_dim", 15),
    ("rms_norm_eps", 0),
    ("rms_norm_eps", float("nan")),
    ("eos_token_id", 100),
    ("eos_token_id", [2, "x"]),
    ("attention_bias", "yes"),
    ("partial_rotary_factor", 0.5),
    ("num_local_experts", 8),
    ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}),
    ("rope_scaling", {"rope_type": "linear"}),
    ("rope_scaling", {"rope_type": "llama3", "factor": 2.0}),
    ("rope_scaling", [1]),
    ("rope_theta", -1),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_what_cannot_be_served_is_refused_by_name_and_value(tmp_path: Path, name: str, value: Any) -> None:
    """An entry that is ignored gives wrong text instead of an error."""
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, **{name: value})
    message = str(caught.value)
    part = name
    if isinstance(value, dict) and name == "rope_scaling":
        part = next(word for word in ("yarn", "factor") if word in message)
    assert part in message
    assert "support" in message or "must" in message or "never run" in message or "goes with" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff\xfe", "[" * 100_000])
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    """Deep nesting ended the process with a recursion error."""
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError):
        read_config(tmp_path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """The message says what a checkpoint is."""
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_config(tmp_path)


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    """A manifest of a later version names families that this one lacks."""
    with pytest.raises(CheckpointError, match="family='other'"):
        family_of(replace(read(tmp_path), family="other"))
