"""The models of the matrix: one in numpy that is exact whatever runs beside it, and small engines in each precision."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import ClassVar

import numpy as np
from safetensors.numpy import load_file, save_file
from tiny_checkpoint import make_tiny_checkpoint
from toy_model import ToyModel

from pageflight.core.manifest import EngineManifest, FileRecord
from pageflight.lowering import registry
from pageflight.lowering.base import CompiledModel, StepInputs
from pageflight.models.checkpoint import open_checkpoint
from pageflight.quant.convert import convert
from pageflight.text.tokenizer import Tokenizer

MAX_LEN = 160
BLOCK_SIZE = 4  # of the toy model
END_EVERY = 24
"""Where the toy model's end of sequence is by far the likeliest: at every length that this divides."""
NUM_BLOCKS_ALONE = 8


def shown_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Ids whose text is printable ASCII: answers of others would be hard to compare by eye, and to cut for a stop."""
    texts = [tokenizer.decode([index]) for index in range(tokenizer.vocab_size)]
    return np.array([bool(text) and text.isascii() and text.isprintable() for text in texts])


class TextModel(ToyModel):
    """A ToyModel whose answers are printable and end."""

    _known: ClassVar[dict[tuple[int, ...], np.ndarray]] = {}  # of all of them: there is one tokenizer

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer.vocab_size, BLOCK_SIZE)
        self._shown = shown_ids(tokenizer)
        self._end = tokenizer.special.eos_ids[0]

    def logits(self, tokens: list[int]) -> np.ndarray:
        key = tuple(tokens)
        if key not in self._known:
            logits = 2 * super().logits(tokens)
            logits[tokens[-6:]] += 4  # it repeats itself, so that penalties matter
            logits[~self._shown] -= 40
            if len(tokens) % END_EVERY == 0:
                logits[self._end] = 12
            self._known[key] = logits
        return self._known[key]


MAX_STEP = 128


def make_checkpoint(folder: Path) -> Path:
    """A tiny Llama whose answers are printable: the other tokens' logits are 0 where these are up to 20."""
    make_tiny_checkpoint(folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][~shown_ids(Tokenizer.load(folder))] = 0
    save_file(weights, folder / "model.safetensors")
    return folder


def make_engine(checkpoint_dir: Path, folder: Path, dtype: str, kv_dtype: str) -> Path:
    """An engine directory as `pageflight build` would make it; its tokenizer included."""
    folder.mkdir()
    config, checkpoint = open_checkpoint(checkpoint_dir)
    path = convert(checkpoint, config, folder / "model.safetensors", dtype=dtype).path
    data = path.read_bytes()
    lowering = registry.get("openvino")
    (folder / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / "tokenizer" / name).write_bytes((checkpoint_dir / name).read_bytes())
    EngineManifest(
        name="tiny",
        family=config.family,
        lowering="openvino",
        dtype=dtype,
        kv_dtype=lowering.default_kv_dtype(dtype) if kv_dtype == "default" else kv_dtype,
        block_size=lowering.block_size,
        max_model_len=MAX_LEN,
        vocab_size=config.vocab_size,
        eos_token_ids=Tokenizer.load(folder / "tokenizer").special.eos_ids,
        model=config.to_json(),
        fingerprint=lowering.fingerprint(dtype),
        files=(FileRecord(path=path.name, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()),),
    ).write(folder)
    return folder


def load(engine_dir: Path, *, is_deterministic: bool = False) -> CompiledModel:
    lowering = registry.get("openvino")
    model = lowering.load(engine_dir, num_threads=1)
    return lowering.deterministic(model, name="tiny", max_num_tokens=MAX_STEP) if is_deterministic else model


class WholePrompts:
    """The logits after a list of tokens, all computed at once by a model of its own: no cache, no batch, no chunks."""

    def __init__(self, model: CompiledModel) -> None:
        self._model = model
        model.allocate(NUM_BLOCKS_ALONE)
        self._known: dict[tuple[int, ...], np.ndarray] = {}

    def logits(self, tokens: list[int]) -> np.ndarray:
        key = tuple(tokens)
        if key not in self._known:
            count, size = len(tokens), self._model.block_size
            num_blocks = -(-count // size)
            self._model.start(
                StepInputs(
                    ids_T=np.array(tokens, np.int64),
                    positions_T=np.arange(count),
                    past_lens_S=np.zeros(1, np.int32),
                    token_begins=np.array([0, count], np.int32),
                    block_indices_N=np.arange(num_blocks, dtype=np.int32),
                    block_begins=np.array([0, num_blocks], np.int32),
                    max_context_len=count,
                    take_L=np.array([count - 1]),
                )
            )
            self._known[key] = self._model.wait()[0].copy()
        return self._known[key]
