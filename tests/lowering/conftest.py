"""Small random checkpoints, engines made of them, and a driver that runs sequences over its own block tables."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pageflight.core.manifest import EngineManifest, FileRecord
from pageflight.lowering.base import CompiledModel, Lowering, StepInputs
from pageflight.lowering.openvino_lowering import OpenVinoLowering
from pageflight.lowering.torch_lowering import TorchLowering
from pageflight.models.checkpoint import open_checkpoint
from pageflight.quant.convert import convert
from pageflight.quant.forms import weight_forms

sys.path.insert(0, str(Path(__file__).parents[2]))  # for perf, which is not installed

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 257,
    "max_position_embeddings": 512,
    "rope_parameters": ROPE,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide-heads": {"hidden_size": 96, "head_dim": 64},
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    "llama3-rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "head-80": {"hidden_size": 80, "head_dim": 80, "num_attention_heads": 2, "num_key_value_heads": 1},
    "head-128": {"head_dim": 128, "num_attention_heads": 2},
    "odd-sizes": {
        "hidden_size": 75,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "head_dim": 32,
        "intermediate_size": 99,
        "vocab_size": 131,
    },
    "quantisable": {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32},
}
LONG: dict[str, dict[str, Any]] = {
    "long": {**SHAPES["quantisable"], "max_position_embeddings": 2048},
    "one-layer": {"num_hidden_layers": 1},
    "two-layers": {"num_hidden_layers": 2},
}
"""Shapes for single tests: those above take part in many."""


@dataclass
class Driver:
    """Runs named sequences on a compiled model, as a scheduler would, and returns the logits of those that sample."""

    model: CompiledModel
    num_blocks: int = 64
    tokens: dict[str, list[int]] = field(default_factory=dict)
    tables: dict[str, list[int]] = field(default_factory=dict)
    past: dict[str, int] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free = np.random.default_rng(5).permutation(self.num_blocks).tolist()

    def forget(self) -> None:
        """Start over: every block is free again."""
        self.tokens, self.tables, self.past = {}, {}, {}
        self.__post_init__()

    def step(self, new: dict[str, list[int]], samples: set[str] | None = None) -> dict[str, np.ndarray]:
        """Append `new[name]` to every named sequence; logits after the last token of those in `samples` (all)."""
        size = self.model.block_size
        for name, ids in new.items():
            self.tokens.setdefault(name, []).extend(ids)
            table = self.tables.setdefault(name, [])
            while len(table) * size < len(self.tokens[name]):
                table.append(self.free.pop())
        past = np.array([self.past.get(name, 0) for name in new], np.int32)
        lens = np.array([len(ids) for ids in new.values()], np.int32)
        begins = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
        tables = [self.tables[name][: -(-int(p + n) // size)] for name, p, n in zip(new, past, lens, strict=True)]
        sampling = [i for i, name in enumerate(new) if samples is None or name in samples]
        inputs = StepInputs(
            ids_T=np.concatenate([np.array(ids, np.int64) for ids in new.values()]),
            positions_T=np.concatenate([np.arange(p, p + n) for p, n in zip(past, lens, strict=True)]).astype(np.int64),
            past_lens_S=past,
            token_begins=begins,
            block_indices_N=np.array([block for table in tables for block in table], np.int32),
            block_begins=np.concatenate([[0], np.cumsum([len(table) for table in tables])]).astype(np.int32),
            max_context_len=int((past + lens).max()),
            take_L=(begins[1:] - 1)[sampling].astype(np.int64),
        )
        self.model.start(inputs)
        logits = self.model.wait().copy()
        assert logits.shape == (len(sampling), self.model.vocab_size)
        assert logits.dtype == np.float32
        for name, n in zip(new, lens, strict=True):
            self.past[name] = self.past.get(name, 0) + int(n)
        names = [list(new)[i] for i in sampling]
        return dict(zip(names, logits, strict=True))

    def share(self, source: str, target: str, num_blocks: int) -> None:
        """Begin `target` with the first blocks of `source`."""
        count = num_blocks * self.model.block_size
        self.tables[target] = self.tables[source][:num_blocks]
        self.tokens[target], self.past[target] = self.tokens[source][:count], count

    def fork(self, source: str, target: str) -> None:
        """Copy on write: `target` shares every full block of `source` and owns a copy of its last one."""
        self.tables[target] = [*self.tables[source][:-1], self.free.pop()]
        self.tokens[target], self.past[target] = list(self.tokens[source]), self.past[source]
        self.model.copy_blocks(
            np.array(self.tables[source][-1:], np.int32), np.array(self.tables[target][-1:], np.int32)
        )


@dataclass(frozen=True)
class Workshop:
    """Makes checkpoints and engines once per session."""

    folder: Path
    cache: dict[Any, Any] = field(default_factory=dict)

    def reference(self, shape: str, state: dict[str, torch.Tensor] | None = None) -> LlamaForCausalLM:
        """The model in transformers, float32, with logits of about unit deviation."""
        if shape not in self.cache:
            torch.manual_seed(len(shape))
            model = LlamaForCausalLM(
                LlamaConfig(**{**BASE, **{**SHAPES, **LONG}[shape]}, attn_implementation="eager")
            ).eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("norm.weight"):
                        parameter.uniform_(0.5, 1.5)
                    elif parameter.ndim == 1:
                        parameter.normal_(0, 0.3)
                    else:
                        parameter.normal_(0, 1.3 * parameter.shape[1] ** -0.5)
            model.save_pretrained(self.folder / shape)
            self.cache[shape] = model
        return self.cache[shape]

    def engine(
        self,
        shape: str,
        lowering: Lowering,
        dtype: str,
        kv_dtype: str,
        group_size: int = 0,
        input_scale: float | None = None,
    ) -> Path:
        """An engine directory as `pageflight build` would make it; kv_dtype `native` is the lowering's choice here.

        `input_scale` is given to all quantised weights.
        """
        self.reference(shape)
        kv_dtype = lowering.default_kv_dtype(dtype) if kv_dtype == "native" else kv_dtype
        folder = self.folder / f"{shape}-{lowering.name}-{dtype}-{group_size}-{kv_dtype}-{input_scale}"
        if not folder.exists():
            folder.mkdir()
            config, checkpoint = open_checkpoint(self.folder / shape)
            path = folder / "model.safetensors"
            forms = weight_forms(config, dtype, group_size) if input_scale else {}
            scales = {name: input_scale for name, form in forms.items() if form.scales and name != "head"}
            convert(checkpoint, config, path, dtype=dtype, group_size=group_size, input_scales=scales)
            data = path.read_bytes()
            record = FileRecord(path=path.name, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            EngineManifest(
                name=shape,
                family=config.family,
                lowering=lowering.name,
                dtype=dtype,
                kv_dtype=kv_dtype,
                quant_group_size=group_size,
                block_size=32,
                max_model_len=config.max_positions,
                vocab_size=config.vocab_size,
                model=config.to_json(),
                fingerprint=lowering.fingerprint(dtype),
                files=(record,),
            ).write(folder)
        return folder

    def driver(
        self,
        shape: str,
        lowering: str,
        dtype: str = "fp32",
        kv_dtype: str = "fp32",
        *,
        group_size: int = 0,
        exact: bool = False,
        input_scale: float | None = None,
    ) -> Driver:
        """A driver with empty blocks on a loaded engine."""
        key = (shape, lowering, dtype, kv_dtype, group_size, exact, input_scale)
        if key not in self.cache:
            target: Lowering = OpenVinoLowering(exact=exact) if lowering == "openvino" else TorchLowering()
            folder = self.engine(shape, target, dtype, kv_dtype, group_size, input_scale)
            model = target.load(folder, num_threads=2)
            driver = Driver(model)
            model.allocate(driver.num_blocks, num_host_blocks=6)
            self.cache[key] = driver
        driver = self.cache[key]
        driver.forget()
        return driver


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    made = Workshop(tmp_path_factory.mktemp("engines"))
    yield made
    for item in made.cache.values():
        if isinstance(item, Driver):
            item.model.close()


@pytest.fixture(scope="session")
def random_ids() -> Callable[[int, int], list[int]]:
    def make(count: int, seed: int = 0) -> list[int]:
        return np.random.default_rng(seed).integers(2, 120, count).tolist()

    return make


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames and not any(
        m.name == "parametrize" for m in metafunc.definition.iter_markers()
    ):
        metafunc.parametrize("shape", sorted(SHAPES))
    if "lowering" in metafunc.fixturenames:
        metafunc.parametrize("lowering", ["torch", "openvino"])
