import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from make_bench_checkpoint import PRESETS, Dtype, Shape, random_tensor, shard_names, to_dtype, write_weights
from rich.progress import Progress

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_bench_checkpoint.py"


def num_parameters(shape: Shape) -> int:
    return sum(int(np.prod(dims)) for _, dims in shape.tensors())


def make(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), "tiny", str(folder), *options], capture_output=True, text=True, check=False
    )


def test_presets_have_the_sizes_that_published_figures_are_about() -> None:
    """A preset that drifts makes every older figure incomparable in silence."""
    assert round(num_parameters(PRESETS["bench-llama-0.5b"]) / 1e6, 1) == 348.7
    small = PRESETS["bench-llama-60m"]
    streamed = num_parameters(small) - small.vocab_size * small.hidden_size
    assert round(streamed * 2 / 1e6, 1) == 55.6


def test_a_checkpoint_loads_and_computes_in_transformers(tmp_path: Path) -> None:
    """Names, shapes and configuration are those of a Llama, with options that change all three."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    done = make(tmp_path, "--tie-word-embeddings", "--attention-bias", "--num-key-value-heads", "2")
    assert done.returncode == 0, done.stderr
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] - {"lm_head.weight"} and not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.model.layers[1].self_attn.q_proj.bias.abs().max() > 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == model.config.vocab_size == 512
    ids = tokenizer("import os", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(ids).logits).all()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    """Values are drawn per tensor name: neither the order nor the shards of a file change them."""
    contents = {}
    for folder, seed, shard_bytes in (("a", 1, 1 << 30), ("b", 1, 1 << 30), ("c", 2, 1 << 30), ("d", 1, 1 << 16)):
        (tmp_path / folder).mkdir()
        with Progress(disable=True) as progress:
            write_weights(
                tmp_path / folder,
                PRESETS["tiny"],
                dtype=Dtype.float32,
                seed=seed,
                progress=progress,
                shard_bytes=shard_bytes,
            )
        from safetensors.numpy import load_file

        contents[folder] = {n: v for f in (tmp_path / folder).glob("*.safetensors") for n, v in load_file(f).items()}
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert not np.array_equal(contents["a"]["lm_head.weight"], contents["c"]["lm_head.weight"])
    assert contents["a"].keys() == contents["d"].keys()
    assert all(np.array_equal(contents["a"][name], contents["d"][name]) for name in contents["a"])


def test_shards_have_an_index_that_names_every_tensor_once(tmp_path: Path) -> None:
    """A tensor larger than a shard got an empty file before it."""
    shards = shard_names(PRESETS["tiny"], Dtype.bfloat16, 1 << 14)
    assert all(shards)
    with Progress(disable=True) as progress:
        total = write_weights(
            tmp_path, PRESETS["tiny"], dtype=Dtype.bfloat16, seed=0, progress=progress, shard_bytes=1 << 14
        )
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(name for name, _ in PRESETS["tiny"].tensors())
    assert {path.name for path in tmp_path.glob("*.safetensors")} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == total == 2 * num_parameters(PRESETS["tiny"])


def test_bfloat16_is_rounded_as_torch_rounds() -> None:
    """Cutting the low bits off instead makes every weight a little smaller in magnitude."""
    torch = pytest.importorskip("torch")
    values = random_tensor("x", (4096,), seed=3)
    values[:3] = np.array([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8)], np.float32)  # ties
    ours = to_dtype(values, Dtype.bfloat16)
    theirs = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--num-attention-heads", "3", "--num-key-value-heads", "2"), "num_attention_heads = 3"),
        (("--head-dim", "5"), "head_dim = 5"),
        (("--vocab-size", "200"), "258"),
    ],
)
def test_shapes_that_cannot_be_are_refused_by_name(tmp_path: Path, options: tuple[str, ...], complaint: str) -> None:
    """The first failure came from inside the engine build, much later."""
    done = make(tmp_path, *options)
    assert done.returncode == 2
    assert complaint in " ".join(done.stderr.replace("│", " ").split())
    assert not list(tmp_path.iterdir())
