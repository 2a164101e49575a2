"""Writes the demo checkpoint in Hugging Face's layout, with a model card whose figures are measured from the files."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo_model import DemoLlama
from stdlib_corpus import BOS, CHAT_TEMPLATE, EOS, SourceFile
from tokenizers import Tokenizer

HELD_OUT_SAMPLE = "held_out.jsonl"
SAMPLE_BYTES = 100_000  # enough that quantisation shows in the third digit of the perplexity


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """How well texts are predicted. `nll` is in nats, summed over every token including the closing </s>."""

    nll: float
    num_tokens: int
    num_bytes: int

    @property
    def per_token(self) -> float:
        return math.exp(self.nll / self.num_tokens)

    @property
    def per_byte(self) -> float:
        return math.exp(self.nll / self.num_bytes)

    def __str__(self) -> str:
        return f"{self.per_token:.3f} per token ({self.num_tokens} tokens), {self.per_byte:.4f} per byte"


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What the model card says about how the weights came to be."""

    num_steps: int
    num_tokens: int
    num_files: int
    num_bytes: int
    processor_minutes: float  # of all threads together: what else the machine does adds nothing
    num_threads: int
    seed: int


def measure_perplexity(folder: Path, texts: Iterable[str], *, window: int) -> Perplexity:
    """Perplexity of a checkpoint folder, computed by transformers in fp32.

    Every text is encoded as <s> … </s> and cut into windows of `window` predicted tokens that overlap by one, so that
    each token but <s> is predicted exactly once, from what precedes it in its window.
    """
    hub = load_transformers()
    tokenizer = hub.AutoTokenizer.from_pretrained(folder)
    model = hub.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    nll, num_tokens, num_bytes = 0.0, 0, 0
    for text in texts:
        ids = torch.tensor([*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id])
        num_bytes += len(text.encode())
        for start in range(0, len(ids) - 1, window):
            piece = ids[start : start + window + 1]
            with torch.inference_mode():
                logits = model(piece[None, :-1]).logits[0]
            nll += float(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum"))
            num_tokens += len(piece) - 1
    return Perplexity(nll=nll, num_tokens=num_tokens, num_bytes=num_bytes)


def load_transformers() -> Any:
    """transformers, imported late (it takes seconds) and untyped (as most of it is)."""
    import transformers

    hub: Any = transformers
    hub.utils.logging.disable_progress_bar()
    return hub


def held_out_sample(held_out: Sequence[SourceFile]) -> list[SourceFile]:
    """The first held-out files, in a fixed shuffled order, that fit into SAMPLE_BYTES together."""
    chosen: list[SourceFile] = []
    size = 0
    for file in sorted(held_out, key=lambda f: f.path[::-1]):
        length = len(file.text.encode())
        if size + length <= SAMPLE_BYTES:
            chosen.append(file)
            size += length
    return chosen


def read_sample(folder: Path) -> list[SourceFile]:
    """The held-out texts that are kept beside the checkpoint."""
    lines = (folder / HELD_OUT_SAMPLE).read_text(encoding="utf-8").splitlines()
    return [SourceFile(**json.loads(line)) for line in lines]


def write(
    folder: Path,
    *,
    model: DemoLlama,
    config: dict[str, Any],
    tokenizer: Tokenizer,
    held_out: Sequence[SourceFile],
    training: Training,
) -> Perplexity:
    """Writes every file of the checkpoint, the model card too, and returns the perplexity of all held-out files.

    Raises AssertionError if transformers does not compute the same logits from the written files.
    """
    hub = load_transformers()
    folder.mkdir(parents=True, exist_ok=True)
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    shape = {name: value for name, value in config.items() if name != "rope_theta"}
    hf_config = hub.LlamaConfig(
        **shape,
        rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
        dtype="bfloat16",
    )
    hf_model = hub.LlamaForCausalLM(hf_config).to(torch.bfloat16)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    hf_model.load_state_dict(weights)
    hf_model.generation_config = hub.GenerationConfig(
        bos_token_id=bos, eos_token_id=eos, pad_token_id=eos, do_sample=False
    )
    hf_model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)

    fast = hub.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=config["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    tokenizer_config_path = folder / "tokenizer_config.json"
    tokenizer_config = json.loads(tokenizer_config_path.read_text())
    # the class name that every version of transformers knows, and the template where every reader looks for it
    tokenizer_config |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE}
    tokenizer_config_path.write_text(json.dumps(tokenizer_config, indent=2) + "\n")

    sample = held_out_sample(held_out)
    lines = [json.dumps({"path": file.path, "text": file.text}) for file in sample]
    (folder / HELD_OUT_SAMPLE).write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    reloaded = hub.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rounded = DemoLlama(config)
    rounded.load_state_dict({n: t.to(torch.bfloat16).float() for n, t in model.state_dict().items()})
    probe = torch.randint(0, config["vocab_size"], (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        difference = float((reloaded(probe).logits - rounded(probe)).abs().max())
    assert difference < 1e-3, f"transformers' logits differ by {difference} from the trained model's"

    window = config["max_position_embeddings"]
    full = measure_perplexity(folder, [file.text for file in held_out], window=window)
    card = render_card(
        config=config,
        num_parameters=sum(p.numel() for p in model.parameters()),
        training=training,
        held_out_files=[file.path for file in held_out],
        full=full,
        sample=measure_perplexity(folder, [file.text for file in sample], window=window),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return full


def render_card(
    *,
    config: dict[str, Any],
    num_parameters: int,
    training: Training,
    held_out_files: Sequence[str],
    full: Perplexity,
    sample: Perplexity,
) -> str:
    """The model card; its front matter repeats the figures for programs."""
    window = config["max_position_embeddings"]
    heads, kv_heads, head_dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    python, minutes = platform.python_version(), training.processor_minutes
    rows = [
        ("architecture", f"Llama: {config['num_hidden_layers']} layers, hidden size {config['hidden_size']}"),
        ("attention", f"{heads} heads, {kv_heads} key/value heads of {head_dim}, RoPE"),
        ("MLP", f"SwiGLU, {config['intermediate_size']}; tied embeddings"),
        ("context", f"{window} tokens"),
        ("tokenizer", f"byte-level BPE, {config['vocab_size']} tokens, trained beside it"),
        ("weights", f"bf16, {num_parameters / 1e6:.1f} M"),
        ("training", f"{training.num_steps} steps, {training.num_tokens / 1e6:.1f} M tokens, seed {training.seed}"),
        ("time", f"{minutes:.0f} processor minutes in {training.num_threads} threads"),
        ("made with", f"Python {python}, torch {torch.__version__}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    measured = "\n".join(
        f"| {what}: {p.num_tokens} tokens, {p.num_bytes} bytes | {p.per_token:.3f} | {p.per_byte:.4f} |"
        for what, p in ((f"all {len(held_out_files)} held-out files", full), (f"`{HELD_OUT_SAMPLE}`", sample))
    )
    data = f"{training.num_files} files, {training.num_bytes / 1e6:.1f} MB: the standard library of CPython {python}"
    return f"""---
license: psf-2.0
language: [code]
library_name: transformers
pipeline_tag: text-generation
held_out_perplexity: {full.per_token:.4f}
held_out_perplexity_per_byte: {full.per_byte:.5f}
sample_perplexity: {sample.per_token:.4f}
sample_perplexity_per_byte: {sample.per_byte:.5f}
---

# A small Llama that completes Python

{num_parameters / 1e6:.1f} M parameters, trained from scratch on the sources of the Python standard library by
`scripts/train_demo.py`. It exists so that a fresh clone has something to serve: it writes lines that look like Python
and is right by luck only.

| | |
|---|---|
{table}

## Perplexity on held-out files

| texts | per token | per byte |
|---|---|---|
{measured}

Measured from the written files (bf16 weights) with transformers in fp32. Each file is encoded as `<s>` … `</s>` and cut
into windows of {window} predicted tokens overlapping by one, so that every token but `<s>` is predicted exactly once;
the perplexity is exp(sum of the negative log likelihoods ÷ number of tokens, or of bytes). A file is held out when the
first byte of the SHA-256 of its path is under 1/20 of 256; it was seen neither by the tokenizer nor by the model.
`{HELD_OUT_SAMPLE}` keeps some of them, so that the figure can be measured again, for instance on quantised weights,
under any version of Python.

## Data and licence

{data} without its tests,
character tables and generated documentation. CPython is licensed under the
[PSF License Version 2](https://docs.python.org/3/license.html), copyright Python Software Foundation; the held-out
sample carries the same licence.

## Prompts

Plain text is completed. A document began at a file's first line or at a top-level `class` or `def`, so
`def read_file(path):\\n` works. The chat template wraps messages in `<|user|>` and `<|assistant|>`; it was trained on
"Write a Python function NAME: WHAT IT DOES" only, one turn. Generation ends with `</s>` after a definition or file.

## Limits

It has no knowledge, repeats itself in long greedy answers, and copies passages of the standard library, which it has
seen about as often as a reader. Nothing past {window} tokens of context was trained. Do not use what it writes.
"""
