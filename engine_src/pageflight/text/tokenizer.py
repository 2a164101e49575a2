"""Text ↔ token ids of one checkpoint, on the `tokenizers` library, with the special tokens its files name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer

from pageflight.core.errors import CheckpointError
from pageflight.text.detokenizer import ByteDetokenizer, Detokenizer, StringDetokenizer, WindowDetokenizer
from pageflight.text.pieces import BytePieces, StringPieces, pieces_of

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """The tokens with a role: their strings by name (as chat templates see them), and the ids that matter here."""

    strings: dict[str, str]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None


class Tokenizer:
    """A checkpoint's tokenizer. Safe to use from several threads."""

    def __init__(self, tokenizer: HFTokenizer, special: SpecialTokens) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.special = special
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special)
        self._pieces: dict[bool, BytePieces | StringPieces | None] = {}
        # Byte-level tokens stand for as many bytes as they have characters, and nothing of a text is dropped: then a
        # text cannot have fewer tokens than its length over that of the longest.
        is_lossless = type(tokenizer.decoder).__name__ == "ByteLevel" and tokenizer.normalizer is None
        self._longest_token = max(map(len, tokenizer.get_vocab()), default=0) if is_lossless else 0

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read `tokenizer.json` and what lies beside it. Raises CheckpointError with the file and the reason."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: a checkpoint needs its fast tokenizer (`tokenizer.json`)")
        try:
            tokenizer = HFTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of damage
            raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from None
        return cls(tokenizer, _special_tokens(tokenizer, folder))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`. With `add_special_tokens` the post-processor in `tokenizer.json` decides what is added."""
        # Only the batch call lets other threads run meanwhile: a long prompt must not hold up those who stream.
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens of `text`, without reading it; 0 where none is known."""
        return -(-len(text) // self._longest_token) if self._longest_token else 0

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`, all at once."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_to_id(self, token: str) -> int | None:
        index: int | None = self._tokenizer.token_to_id(token)
        return index

    def detokenizer(self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> Detokenizer:
        """State that turns the ids of one sequence, which follows `prompt_ids`, into text as they come."""
        if skip_special_tokens not in self._pieces:
            self._pieces[skip_special_tokens] = pieces_of(self._tokenizer, skip_special_tokens=skip_special_tokens)
        table = self._pieces[skip_special_tokens]
        if isinstance(table, BytePieces):
            return ByteDetokenizer(table, prompt_ids)
        if isinstance(table, StringPieces):
            return StringDetokenizer(table, prompt_ids)
        return WindowDetokenizer(self._tokenizer, prompt_ids, skip_special_tokens=skip_special_tokens)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`; empty when there is no such file. Raises CheckpointError when it is damaged."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def _special_tokens(tokenizer: HFTokenizer, folder: Path) -> SpecialTokens:
    config = read_json(folder / "tokenizer_config.json")
    special_map = read_json(folder / "special_tokens_map.json")
    generation = read_json(folder / "generation_config.json")
    model = read_json(folder / "config.json")
    strings = {}
    for name in _SPECIAL_NAMES:
        token = config.get(name) or special_map.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if token:
            strings[name] = str(token)

    def id_of(role: str) -> int | None:
        index = tokenizer.token_to_id(strings[f"{role}_token"]) if f"{role}_token" in strings else None
        return index if index is not None else _first(generation, model, f"{role}_token_id")

    eos: list[int] = []
    for source in (generation.get("eos_token_id"), id_of("eos"), None if generation else model.get("eos_token_id")):
        found = source if isinstance(source, list) else [source]
        eos += [index for index in found if isinstance(index, int) and index not in eos]
    return SpecialTokens(strings=strings, bos_id=id_of("bos"), eos_ids=tuple(eos), pad_id=id_of("pad"))


def _first(generation: dict[str, Any], model: dict[str, Any], name: str) -> int | None:
    for source in (generation.get(name), model.get(name)):
        value = source[0] if isinstance(source, list) and source else source
        if isinstance(value, int):
            return value
    return None
