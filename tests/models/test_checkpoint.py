"""Checkpoints are proven complete before a byte of weights is used."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from pageflight.core.errors import CheckpointError
from pageflight.models.bits import bf16_bits, bf16_values, to_float32
from pageflight.models.checkpoint import open_checkpoint
from pageflight.models.safetensors_file import SafetensorsFile, SafetensorsWriter

Make = Callable[..., Path]
HEAD = "lm_head.weight"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_read_as_they_were_written(make_checkpoint: Make, dtype: str, shards: int) -> None:
    """bf16 has no numpy type: its bits were read as integers and used as values."""
    kept: dict[str, np.ndarray[Any, Any]] = {}
    folder = make_checkpoint(dtype=dtype, shards=shards, change=kept.update)
    _, checkpoint = open_checkpoint(folder)
    assert set(checkpoint.names) == set(kept)
    for name, values in kept.items():
        array = to_float32(checkpoint.array(name), checkpoint.record(name).dtype)
        np.testing.assert_array_equal(array, values.astype(np.float32))


def drop_head(values: dict[str, Any]) -> None:
    del values[HEAD]


def wrong_shape(values: dict[str, Any]) -> None:
    values["model.norm.weight"] = values["model.norm.weight"][:-1]


def wrong_dtype(values: dict[str, Any]) -> None:
    values["model.norm.weight"] = values["model.norm.weight"].astype(np.int32)


def stranger(values: dict[str, Any]) -> None:
    values["model.layers.0.self_attn.q_norm.weight"] = np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_head, ["lacks", HEAD]),
        (wrong_shape, ["model.norm.weight", "[15]", "[16]"]),
        (wrong_dtype, ["model.norm.weight", "I32", "supported"]),
        (stranger, ["q_norm", "does not have"]),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_config_is_refused(
    make_checkpoint: Make, change: Callable[[dict[str, Any]], None], words: list[str]
) -> None:
    """A tensor nobody reads means the model is another one than config.json says."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(make_checkpoint(change=change))
    assert all(word in str(caught.value) for word in words)


def test_old_rotary_buffers_are_no_strangers(make_checkpoint: Make) -> None:
    """Checkpoints of 2023 store inv_freq, which follows from the configuration."""

    def change(values: dict[str, Any]) -> None:
        values["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)

    open_checkpoint(make_checkpoint(change=change))


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_may_repeat_the_embedding_but_not_differ(make_checkpoint: Make, same: bool) -> None:
    """A head that differs would be dropped in silence."""

    def change(values: dict[str, Any]) -> None:
        values[HEAD] = values["model.embed_tokens.weight"] + np.float32(0 if same else 1)

    folder = make_checkpoint(config={"tie_word_embeddings": True}, change=change)
    if same:
        open_checkpoint(folder)
    else:
        with pytest.raises(CheckpointError, match="tie_word_embeddings"):
            open_checkpoint(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickles_are_refused_with_the_reason(make_checkpoint: Make, name: str) -> None:
    """Opening one runs whatever code its author put there."""
    folder = make_checkpoint()
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(CheckpointError, match="can run any code"):
        open_checkpoint(folder)


def test_missing_weights_and_folders_are_refused(make_checkpoint: Make, tmp_path: Path) -> None:
    """The message names what was looked for."""
    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
        open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoint(tmp_path / "nowhere")


def damage_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def test_an_index_that_names_what_is_not_there_is_refused(make_checkpoint: Make) -> None:
    """Missing shards, tensors in the wrong shard, paths out of the folder, an index that is none."""
    folder = make_checkpoint(shards=2)
    (folder / "model-00002-of-00002.safetensors").rename(folder / "away")
    with pytest.raises(CheckpointError, match="files that are missing: model-00002"):
        open_checkpoint(folder)
    (folder / "away").rename(folder / "model-00002-of-00002.safetensors")
    damage_index(folder, lambda data: data["weight_map"].update(ghost="model-00001-of-00002.safetensors"))
    with pytest.raises(CheckpointError, match="not in their file: ghost"):
        open_checkpoint(folder)
    damage_index(folder, lambda data: data["weight_map"].update(ghost="../other.safetensors"))
    with pytest.raises(CheckpointError, match=r"'\.\./other\.safetensors'"):
        open_checkpoint(folder)
    damage_index(folder, lambda data: data.update(weight_map=3))
    with pytest.raises(CheckpointError, match="weight_map"):
        open_checkpoint(folder)


def test_truncated_files_are_refused_at_every_length(make_checkpoint: Make) -> None:
    """A download that stopped gave a model with zeros at its end."""
    folder = make_checkpoint()
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for length in (0, 7, 8, 100, 2000, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"truncated|damaged"):
            open_checkpoint(folder)
    path.write_bytes(data + b"x")
    with pytest.raises(CheckpointError, match="belong to no tensor"):
        open_checkpoint(folder)


HEADERS: list[tuple[Any, str]] = [
    ([], "not an object"),
    ({"a": {"dtype": "F32", "shape": [2]}}, "lacks dtype, shape or data_offsets"),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "takes 8"),
    ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, "malformed"),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, "malformed"),
    ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "expected"),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": 3}, "__metadata__"),
]


@pytest.mark.parametrize(("header", "reason"), HEADERS)
def test_tampered_headers_are_refused(tmp_path: Path, header: Any, reason: str) -> None:
    """Offsets that point outside or overlap read other tensors' bytes."""
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(CheckpointError, match=reason):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_a_header_length_beyond_the_file_is_refused(tmp_path: Path) -> None:
    """A length of 2**60 asked for that much memory."""
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(CheckpointError, match="claims"):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_what_the_writer_wrote_the_safetensors_library_reads(tmp_path: Path) -> None:
    """The engine's file is an ordinary one; tools may open it."""
    path = tmp_path / "made.safetensors"
    a, b = np.arange(6, dtype=np.int8).reshape(2, 3), np.linspace(0, 1, 5, dtype=np.float32)
    writer = SafetensorsWriter(path, {"a": ("I8", (2, 3)), "b": ("F32", (5,)), "c": ("F32", (0, 4))}, {"k": "v"})
    assert not path.exists()
    writer.array("a")[:], writer.array("b")[:] = a, b
    writer.close()
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"k": "v"}
        np.testing.assert_array_equal(file.get_tensor("a"), a)
        np.testing.assert_array_equal(file.get_tensor("b"), b)
        assert file.get_tensor("c").shape == (0, 4)
    assert sorted(item.name for item in tmp_path.iterdir()) == [path.name]


def test_an_abandoned_file_leaves_nothing(tmp_path: Path) -> None:
    """A build that failed left a file that looked like an engine."""
    SafetensorsWriter(tmp_path / "made.safetensors", {"a": ("I8", (2,))}, {}).abandon()
    assert list(tmp_path.iterdir()) == []


def test_duplicate_tensors_across_shards_are_refused(make_checkpoint: Make) -> None:
    """Which of the two was used depended on the order of the folder."""
    folder = make_checkpoint(shards=2)
    placement = {HEAD: "model-00001-of-00002.safetensors", "other": "model-00002-of-00002.safetensors"}
    save_file({HEAD: np.zeros(1, np.float32)}, folder / placement[HEAD])
    save_file({HEAD: np.ones(1, np.float32), "other": np.ones(1, np.float32)}, folder / placement["other"])
    damage_index(folder, lambda data: data.update(weight_map=placement))
    with pytest.raises(CheckpointError, match="is in both"):
        open_checkpoint(folder)


def test_bf16_rounds_to_even_and_back_exactly() -> None:
    """Truncation lost half a unit of every weight, always towards zero."""
    values = np.array([1.0, 1.00390625, 1.01171875, -3.1415927, 0.0, 1e-40], np.float32)
    bits = bf16_bits(values)
    assert bits[:3].tolist() == [0x3F80, 0x3F80, 0x3F82]
    np.testing.assert_allclose(bf16_values(bits), values, rtol=2**-8, atol=1e-38)
    np.testing.assert_array_equal(bf16_bits(bf16_values(bits)), bits)
