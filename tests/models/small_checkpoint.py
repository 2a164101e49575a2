"""A tiny Llama checkpoint written by the safetensors library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def tensors(config: dict[str, Any], dtype: Any) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (hidden, hidden),
            prefix + "self_attn.k_proj.weight": (kv, hidden),
            prefix + "self_attn.v_proj.weight": (kv, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "mlp.down_proj.weight": (hidden, inner),
        }
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint folder: `config` and `change` alter entries, `shards` > 1 splits it behind an index."""

    def make(
        *,
        dtype: str = "float32",
        shards: int = 1,
        config: dict[str, Any] | None = None,
        change: Callable[[dict[str, np.ndarray[Any, Any]]], None] | None = None,
    ) -> Path:
        folder = tmp_path / "checkpoint"
        folder.mkdir(exist_ok=True)
        entries = {**CONFIG, **(config or {})}
        (folder / "config.json").write_text(json.dumps(entries), encoding="utf-8")
        values = tensors(entries, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        if change is not None:
            change(values)
        if shards == 1:
            save_file(values, folder / "model.safetensors")
            return folder
        names = sorted(values)
        placement = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
        for shard in set(placement.values()):
            save_file({name: values[name] for name in names if placement[name] == shard}, folder / shard)
        index = {"metadata": {}, "weight_map": placement}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        return folder

    return make
