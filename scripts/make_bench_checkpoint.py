#!/usr/bin/env python3
"""Makes Llama checkpoints of any shape with random weights and a real tokenizer, for measuring speed.

    python scripts/make_bench_checkpoint.py bench-llama-0.5b OUTPUT
    python scripts/make_bench_checkpoint.py bench-llama-60m OUTPUT --num-hidden-layers 4 --dtype float16

Weights are made with numpy and written with safetensors in files of 2 GB, so memory sets no limit to the shape, and
neither torch nor transformers is needed. The same seed and shape give the same bytes on every machine.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors
import typer
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parent))

from stdlib_corpus import BOS, EOS, read_stdlib, train_tokenizer

SHARD_BYTES = 2 << 30


class Dtype(str, Enum):
    """Element types of weights, by their names in config.json."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a checkpoint looks like; the field names are those of a Llama's config.json."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int = 8192
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd; rotary embeddings need pairs")
        if self.vocab_size < 258:
            raise ValueError(f"vocab_size = {self.vocab_size} is under 258: 256 bytes, {BOS} and {EOS}")

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order of the forward pass."""
        query, key_value = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab_size, self.hidden_size)
        linears = [
            ("self_attn.q_proj", query, self.hidden_size, self.attention_bias),
            ("self_attn.k_proj", key_value, self.hidden_size, self.attention_bias),
            ("self_attn.v_proj", key_value, self.hidden_size, self.attention_bias),
            ("self_attn.o_proj", self.hidden_size, query, self.attention_bias),
            ("mlp.gate_proj", self.intermediate_size, self.hidden_size, self.mlp_bias),
            ("mlp.up_proj", self.intermediate_size, self.hidden_size, self.mlp_bias),
            ("mlp.down_proj", self.hidden_size, self.intermediate_size, self.mlp_bias),
        ]
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (self.hidden_size,)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden_size,)
            for name, rows, columns, bias in linears:
                yield f"{prefix}.{name}.weight", (rows, columns)
                if bias:
                    yield f"{prefix}.{name}.bias", (rows,)
        yield "model.norm.weight", (self.hidden_size,)
        if not self.tie_word_embeddings:
            yield "lm_head.weight", (self.vocab_size, self.hidden_size)


PRESETS = {
    "bench-llama-0.5b": Shape(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        intermediate_size=2816,
        vocab_size=32000,
    ),
    "bench-llama-60m": Shape(
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=1408,
        vocab_size=8192,
    ),
    "tiny": Shape(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=128,
        vocab_size=512,
        max_position_embeddings=512,
    ),
}


def random_tensor(name: str, shape: tuple[int, ...], *, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Norms are 1, everything else is normal with standard deviation 0.02; depends on name, shape and seed alone."""
    if name.endswith("norm.weight"):
        return np.ones(shape, np.float32)
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    values = np.random.default_rng([seed, key]).standard_normal(shape, np.float32)
    values *= np.float32(0.02)
    return values


def to_dtype(values: np.ndarray[Any, np.dtype[np.float32]], dtype: Dtype) -> np.ndarray[Any, np.dtype[Any]]:
    """The same values in the wanted type; bfloat16, which numpy lacks, as its bits, rounded to nearest even."""
    if dtype is Dtype.bfloat16:
        bits = values.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return rounded.astype("<u2")
    return values.astype("<f4" if dtype is Dtype.float32 else "<f2", copy=False)


def shard_names(shape: Shape, dtype: Dtype, shard_bytes: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """The tensors of each file, at most `shard_bytes` in a file unless one tensor alone is larger."""
    item_bytes = 4 if dtype is Dtype.float32 else 2
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, dims in shape.tensors():
        length = int(np.prod(dims)) * item_bytes
        if shards[-1] and size + length > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, dims))
        size += length
    return shards


def write_weights(
    folder: Path, shape: Shape, *, dtype: Dtype, seed: int, progress: Progress, shard_bytes: int = SHARD_BYTES
) -> int:
    """Writes model.safetensors, or shards and their index, and returns the bytes of all tensors together."""
    shards = shard_names(shape, dtype, shard_bytes)
    task = progress.add_task("weights", total=sum(len(shard) for shard in shards))
    index: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {}  # the specs below hold bare pointers into these
        specs = {}
        for name, dims in shard:
            array = arrays[name] = to_dtype(random_tensor(name, dims, seed=seed), dtype)
            specs[name] = safetensors.TensorSpec(
                dtype=dtype.value, shape=dims, data_ptr=array.ctypes.data, data_len=array.nbytes
            )
            index[name] = file
            total += array.nbytes
            progress.advance(task)
        safetensors.serialize_file(specs, folder / file, {"format": "pt"})
    if len(shards) > 1:
        listing = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(listing, indent=2) + "\n")
    return total


def write_json_files(folder: Path, shape: Shape, dtype: Dtype) -> None:
    """config.json and generation_config.json, as transformers writes them for a Llama."""
    config = {field.name: getattr(shape, field.name) for field in fields(shape)}
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": dtype.value,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    generation = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def write_tokenizer(folder: Path, shape: Shape) -> None:
    """A byte-level BPE tokenizer of exactly the vocabulary's size.

    Raises ValueError if the standard library does not yield so many tokens.
    """
    texts = [file.text for file in read_stdlib()]
    tokenizer = train_tokenizer(texts, vocab_size=shape.vocab_size, special_tokens=[BOS, EOS], add_bos=False)
    if tokenizer.get_vocab_size() < shape.vocab_size:
        raise ValueError(
            f"vocab_size = {shape.vocab_size}, but the standard library's sources yield only "
            f"{tokenizer.get_vocab_size()} tokens"
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": shape.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main(
    preset: Annotated[str, typer.Argument(help=f"The shape to start from: {', '.join(PRESETS)}.")],
    output: Annotated[Path, typer.Argument(help="Folder for the checkpoint.")],
    hidden_size: Annotated[int | None, typer.Option(min=1)] = None,
    num_hidden_layers: Annotated[int | None, typer.Option(min=1)] = None,
    num_attention_heads: Annotated[int | None, typer.Option(min=1)] = None,
    num_key_value_heads: Annotated[int | None, typer.Option(min=1)] = None,
    head_dim: Annotated[int | None, typer.Option(min=2)] = None,
    intermediate_size: Annotated[int | None, typer.Option(min=1)] = None,
    vocab_size: Annotated[int | None, typer.Option(min=258)] = None,
    max_position_embeddings: Annotated[int | None, typer.Option(min=1)] = None,
    rope_theta: Annotated[float | None, typer.Option(min=1.0)] = None,
    rms_norm_eps: Annotated[float | None, typer.Option(min=0.0)] = None,
    tie_word_embeddings: Annotated[bool | None, typer.Option(help="Share the embedding with the head.")] = None,
    attention_bias: Annotated[bool | None, typer.Option(help="Biases in the attention's projections.")] = None,
    mlp_bias: Annotated[bool | None, typer.Option(help="Biases in the MLP's projections.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Element type of the weights.")] = Dtype.bfloat16,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights.")] = 1234,
) -> None:
    """Write a Llama checkpoint with random weights; every option replaces one number of the preset."""
    if preset not in PRESETS:
        raise typer.BadParameter(f"{preset!r} is none of {', '.join(PRESETS)}", param_hint="PRESET")
    given: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate_size,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_position_embeddings,
        "rope_theta": rope_theta,
        "rms_norm_eps": rms_norm_eps,
        "tie_word_embeddings": tie_word_embeddings,
        "attention_bias": attention_bias,
        "mlp_bias": mlp_bias,
    }
    try:
        shape = replace(PRESETS[preset], **{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    write_json_files(output, shape, dtype)
    with console.status("training the tokenizer"):
        write_tokenizer(output, shape)
    with Progress(console=console) as progress:
        total = write_weights(output, shape, dtype=dtype, seed=seed, progress=progress)
    num_parameters = sum(int(np.prod(dims)) for _, dims in shape.tensors())
    console.print(f"{output}: {num_parameters / 1e6:.1f} M parameters, {total / 1e6:.1f} MB ({dtype.value})")


if __name__ == "__main__":
    typer.run(main)
