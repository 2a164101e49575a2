"""A stand-in for Triton's module, and a small checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parent))

import triton_stub  # noqa: F401  must come before what imports Triton's module

from pageflight.backend.generations import GenerationBuilder
from pageflight.core.manifest import EngineManifest
from pageflight.text.tokenizer import SpecialTokens, Tokenizer

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
