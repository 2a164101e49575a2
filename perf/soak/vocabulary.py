"""Prompts of so many tokens, made of words, in the tokens of the checkpoint's own tokenizer."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer

_TEXT = (
    "def class return self import for in while if else not None True False with open file path name value key list dict"
    " the of and a to is are data = ( ) [ ] : . , + - 0 1 2 10 text line size count index result error number"
)
_WORDS = _TEXT.split()


class Vocabulary:
    """Makes prompts; equal random numbers give equal ones."""

    def __init__(self, tokenizer_json: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer_json))

    def text(self, chance: random.Random, num_tokens: int) -> str:
        """About `num_tokens` tokens: cutting a text may change its last ones."""
        words = " ".join(chance.choice(_WORDS) for _ in range(num_tokens))
        offsets = self._tokenizer.encode(words, add_special_tokens=False).offsets
        return words[: offsets[min(num_tokens, len(offsets)) - 1][1]]

    def ids(self, chance: random.Random, num_tokens: int) -> tuple[int, ...]:
        """Exactly `num_tokens` token ids."""
        words = " ".join(chance.choice(_WORDS) for _ in range(num_tokens))
        encoded = self._tokenizer.encode(words, add_special_tokens=False).ids
        return tuple(encoded[:num_tokens])
