"""A stand-in for Triton's module, which exists inside the server's stub processes only, and a small checkpoint."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from pageflight.backend.generations import GenerationBuilder
from pageflight.core.manifest import EngineManifest
from pageflight.text.tokenizer import SpecialTokens, Tokenizer


@dataclass
class Tensor:
    tensor_name: str
    array: np.ndarray

    def name(self) -> str:
        return self.tensor_name

    def as_numpy(self) -> np.ndarray:
        return self.array


@dataclass
class TritonError:
    message: str
    code: str = "INTERNAL"


for _code in ("INTERNAL", "INVALID_ARG", "UNAVAILABLE", "CANCELLED"):
    setattr(TritonError, _code, _code)


@dataclass
class InferenceResponse:
    output_tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None


def _install() -> None:
    module: Any = types.ModuleType("triton_python_backend_utils")
    module.Tensor, module.TritonError, module.InferenceResponse = Tensor, TritonError, InferenceResponse
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    sys.modules.setdefault("triton_python_backend_utils", module)


_install()

EOS = 3


def make_tokenizer() -> Tokenizer:
    made = HFTokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["the fox"], trainers.BpeTrainer(vocab_size=262, initial_alphabet=alphabet, show_progress=False)
    )
    return Tokenizer(made, SpecialTokens(strings={}, bos_id=None, eos_ids=(EOS,), pad_id=None))


@pytest.fixture(scope="module")
def builder() -> GenerationBuilder:
    tokenizer = make_tokenizer()
    manifest = EngineManifest(
        name="m",
        family="llama",
        lowering="openvino",
        dtype="fp32",
        kv_dtype="fp32",
        block_size=32,
        max_model_len=100,
        vocab_size=tokenizer.vocab_size,
        eos_token_ids=(EOS,),
        model={},
        fingerprint={},
    )
    return GenerationBuilder(manifest, tokenizer, default_max_tokens=64, exclude_input_in_output=True)
