"""From checkpoint to stored weights: fused, rounded once, complete or absent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch

from pageflight.core.errors import CheckpointError, ConfigError, ManifestMismatch
from pageflight.models.checkpoint import open_checkpoint
from pageflight.models.safetensors_file import SafetensorsFile, SafetensorsWriter
from pageflight.quant import convert as convert_module
from pageflight.quant.convert import convert
from pageflight.quant.float8 import quantise_fp8
from pageflight.quant.forms import input_scale_name, scale_name
from pageflight.quant.int4 import quantise_int4
from pageflight.quant.store import WeightStore
from pageflight.quant.weight import quantise

Make = Callable[..., Path]
Q, K, V = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv")


@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rows_at_once", [1 << 22, 48])
def test_fused_weights_are_their_parts_stacked(
    make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, rows_at_once: int
) -> None:
    """Pieces of a large weight were written over each other."""
    monkeypatch.setattr(convert_module, "_PIECE_ELEMENTS", rows_at_once)
    kept: dict[str, np.ndarray[Any, Any]] = {}
    config, checkpoint = open_checkpoint(make_checkpoint(dtype=source, change=kept.update))
    convert(checkpoint, config, tmp_path / "w.safetensors", dtype="fp32")
    store = WeightStore(tmp_path / "w.safetensors", config)
    expected = np.concatenate([kept[name].astype(np.float32) for name in (Q, K, V)])
    np.testing.assert_array_equal(store["layers.1.qkv"].float32(), expected)
    mlp = [kept[f"model.layers.0.mlp.{part}_proj.weight"].astype(np.float32) for part in ("gate", "up")]
    np.testing.assert_array_equal(store["layers.0.gate_up"].float32(), np.concatenate(mlp))


def test_bf16_checkpoints_keep_their_bits(make_checkpoint: Make, tmp_path: Path) -> None:
    """A round trip through float32 must not touch them; norms become float32, exactly."""
    kept: dict[str, np.ndarray[Any, Any]] = {}
    config, checkpoint = open_checkpoint(make_checkpoint(dtype="bfloat16", change=kept.update))
    made = convert(checkpoint, config, tmp_path / "w.safetensors", dtype="bf16")
    store = WeightStore(made.path, config)
    assert made.max_error == 0
    assert store["head"].dtype == "BF16"
    np.testing.assert_array_equal(store["head"].values, kept["lm_head.weight"].view(np.uint16))
    assert store["norm"].dtype == "F32"
    np.testing.assert_array_equal(store["norm"].values, kept["model.norm.weight"].astype(np.float32))


@pytest.mark.parametrize("group_size", [0, 8])
def test_int8_stores_what_quantise_gives(make_checkpoint: Make, tmp_path: Path, group_size: int) -> None:
    """Linear weights only: the embedding is looked up, not multiplied."""
    kept: dict[str, np.ndarray[Any, Any]] = {}
    config, checkpoint = open_checkpoint(make_checkpoint(change=kept.update))
    made = convert(checkpoint, config, tmp_path / "w.safetensors", dtype="int8", group_size=group_size)
    store = WeightStore(made.path, config)
    assert store["embed"].dtype == "BF16"
    codes, scales = quantise(np.concatenate([kept[name] for name in (Q, K, V)]), group_size)
    weight = store["layers.1.qkv"]
    np.testing.assert_array_equal(weight.values, codes)
    assert weight.scales is not None
    np.testing.assert_array_equal(weight.scales, scales)
    assert 0 < made.max_error < 0.02


@pytest.mark.parametrize(("dtype", "kind"), [("fp8", "F8_E4M3"), ("int4", "I4")])
def test_fp8_and_int4_store_what_their_quantisers_give(
    make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, kind: str
) -> None:
    """Linear weights but the head, whose error goes straight into the logits."""
    monkeypatch.setattr(convert_module, "_PIECE_ELEMENTS", 48)
    kept: dict[str, np.ndarray[Any, Any]] = {}
    config, checkpoint = open_checkpoint(make_checkpoint(change=kept.update))
    group_size = 8 if kind == "I4" else 0
    path = convert(checkpoint, config, tmp_path / "w.safetensors", dtype=dtype, group_size=group_size).path
    store = WeightStore(path, config)
    assert (store["embed"].dtype, store["head"].dtype, store["norm"].dtype) == ("BF16", "BF16", "F32")
    values = np.concatenate([kept[name] for name in (Q, K, V)])
    codes, scales = quantise_int4(values, 8) if kind == "I4" else quantise_fp8(values)
    weight = store["layers.1.qkv"]
    assert (weight.dtype, weight.shape, weight.input_scale) == (kind, values.shape, None)
    np.testing.assert_array_equal(weight.values, codes)
    np.testing.assert_array_equal(weight.scales, scales)  # type: ignore[arg-type]
    assert SafetensorsFile(path).records["layers.1.qkv"].dtype == ("U8" if kind == "I4" else "F8_E4M3")
    assert safetensors.torch.load_file(path)["layers.1.qkv"].shape == codes.shape, "other programs read it too"


def test_fp16_checkpoints_keep_their_bits(make_checkpoint: Make, tmp_path: Path) -> None:
    """They went through bf16 and lost three bits."""
    kept: dict[str, np.ndarray[Any, Any]] = {}
    config, checkpoint = open_checkpoint(make_checkpoint(dtype="float16", change=kept.update))
    made = convert(checkpoint, config, tmp_path / "w.safetensors", dtype="fp16")
    store = WeightStore(made.path, config)
    assert made.max_error == 0 and store["head"].dtype == "F16"
    np.testing.assert_array_equal(store["head"].values, kept["lm_head.weight"])


def test_scales_of_activations_are_kept_with_their_weights(make_checkpoint: Make, tmp_path: Path) -> None:
    """What a calibration found was lost on the way to the engine."""
    config, checkpoint = open_checkpoint(make_checkpoint())
    scales = {"layers.0.qkv": 0.125, "layers.1.down": 0.5}
    path = convert(checkpoint, config, tmp_path / "w.safetensors", dtype="fp8", input_scales=scales).path
    store = WeightStore(path, config)
    found = {name: store[name].input_scale for name in store.forms if store[name].input_scale is not None}
    assert found == scales


@pytest.mark.parametrize("dtype", ["bf16", "int8", "fp8"])
def test_a_tied_head_is_stored_once_unless_it_is_int8(make_checkpoint: Make, tmp_path: Path, dtype: str) -> None:
    """Looked-up rows stay bf16; the head is read whole at every step and wants int8."""
    config, checkpoint = open_checkpoint(make_checkpoint(config={"tie_word_embeddings": True}))
    path = convert(checkpoint, config, tmp_path / "w.safetensors", dtype=dtype).path
    store = WeightStore(path, config)
    assert ("head" in SafetensorsFile(path).records) == (dtype == "int8")
    assert store["head"].dtype == ("I8" if dtype == "int8" else "BF16")
    np.testing.assert_allclose(store["head"].float32(), store["embed"].float32(), atol=0.05)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "fp8", "int8", "int4"])
def test_weights_that_are_no_numbers_are_refused_and_leave_nothing(
    make_checkpoint: Make, tmp_path: Path, bad: float, dtype: str
) -> None:
    """One NaN turns every logit into NaN, and the engine would be built."""

    def change(values: dict[str, Any]) -> None:
        values[K][3, 5] = bad

    config, checkpoint = open_checkpoint(make_checkpoint(change=change))
    with pytest.raises(CheckpointError, match=r"k_proj\.weight holds 1 NaN or infinite"):
        convert(checkpoint, config, tmp_path / "w.safetensors", dtype=dtype)
    assert [item.name for item in tmp_path.iterdir()] == ["checkpoint"]


def test_values_beyond_bf16_are_refused(make_checkpoint: Make, tmp_path: Path) -> None:
    """float32 reaches a little further: rounding made infinity of a finite weight."""

    def change(values: dict[str, Any]) -> None:
        values[K][3, 5] = 3.4e38

    config, checkpoint = open_checkpoint(make_checkpoint(change=change))
    with pytest.raises(CheckpointError, match="beyond bf16"):
        convert(checkpoint, config, tmp_path / "w.safetensors", dtype="bf16")
    convert(checkpoint, config, tmp_path / "w.safetensors", dtype="fp32")


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "fp4"},
        {"dtype": "bf16", "group_size": 8},
        {"dtype": "fp8", "group_size": 8},
        {"dtype": "int8", "group_size": 5},
        {"dtype": "int4", "group_size": 5},
        {"dtype": "fp8", "input_scales": {"layers.0.qvk": 0.1}},
        {"dtype": "bf16", "input_scales": {"layers.0.qkv": 0.1}},
        {"dtype": "fp8", "input_scales": {"head": 0.1}},
    ],
)
def test_options_that_cannot_work_are_refused(make_checkpoint: Make, tmp_path: Path, options: dict[str, Any]) -> None:
    """A group size beside bf16 would be ignored."""
    config, checkpoint = open_checkpoint(make_checkpoint())
    with pytest.raises(ConfigError):
        convert(checkpoint, config, tmp_path / "w.safetensors", **options)
    assert [item.name for item in tmp_path.iterdir()] == ["checkpoint"]


def test_progress_rises_to_its_total(make_checkpoint: Make, tmp_path: Path) -> None:
    """A bar that ended at 97 % looked like a failure."""
    config, checkpoint = open_checkpoint(make_checkpoint())
    seen: list[tuple[int, int]] = []
    convert(checkpoint, config, tmp_path / "w.safetensors", dtype="int8", progress=lambda *at: seen.append(at))
    done = [at for at, _ in seen]
    assert done == sorted(set(done))
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("damage", ["drop", "shape", "scales", "extra", "truncate"])
def test_a_store_that_does_not_fit_its_model_is_refused(make_checkpoint: Make, tmp_path: Path, damage: str) -> None:
    """Weights of another build beside the right manifest."""
    config, checkpoint = open_checkpoint(make_checkpoint())
    path = convert(checkpoint, config, tmp_path / "w.safetensors", dtype="int8").path
    layout = {name: (record.dtype, record.shape) for name, record in SafetensorsFile(path).records.items()}
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        if damage == "drop":
            del layout["norm"]
        elif damage == "shape":
            layout["norm"] = ("F32", (15,))
        elif damage == "scales":
            del layout[scale_name("head")]
        else:
            layout["stranger"] = ("F32", (1,))
        SafetensorsWriter(path, layout, {}).close()
    with pytest.raises(ManifestMismatch):
        WeightStore(path, config)


@pytest.mark.parametrize(
    ("dtype", "damage"),
    [
        ("fp8", {scale_name("layers.0.qkv"): ("F32", (32, 2))}),
        ("fp8", {scale_name("layers.0.qkv"): ("F32", (1, 2))}),
        ("fp8", {scale_name("layers.0.qkv"): ("F16", (32, 1))}),
        ("fp8", {scale_name("head"): ("F32", (40, 1))}),
        ("fp8", {input_scale_name("layers.0.qkv"): ("F32", (1,))}),
        ("fp8", {input_scale_name("layers.0.qkv"): ("F32", (2,))}),
        ("fp8", {input_scale_name("head"): ("F32", (1,))}),
        ("int4", {"layers.0.qkv": ("U8", (32, 16))}),
        ("int4", {"norm": ("U8", (8,))}),
        ("int4", {scale_name("layers.0.qkv"): ("F32", (1, 1))}),
        ("int4", {scale_name("layers.0.qkv"): ("F32", (32, 3))}),
    ],
)
def test_a_quantised_store_with_odd_parts_is_refused(
    make_checkpoint: Make, tmp_path: Path, dtype: str, damage: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    """A scale of zero for the activations gave NaN; one that nothing reads was carried along."""
    config, checkpoint = open_checkpoint(make_checkpoint())
    path = convert(checkpoint, config, tmp_path / "w.safetensors", dtype=dtype).path
    layout = {name: (record.dtype, record.shape) for name, record in SafetensorsFile(path).records.items()}
    WeightStore(path, config)
    SafetensorsWriter(path, {**layout, **damage}, {}).close()
    with pytest.raises(ManifestMismatch, match=next(iter(damage)).removesuffix(".scale").removesuffix(".input_scale")):
        WeightStore(path, config)
