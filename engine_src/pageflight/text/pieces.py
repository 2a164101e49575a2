"""What each token id adds to the text, worked out once per tokenizer from its decoder.

Nearly every tokenizer's decoder is *linear*: the text is the concatenation of one piece per token, except for bytes
that only together form a character. Two linear kinds are recognised and become tables, so that a token costs a list
lookup; anything else is left to `WindowDetokenizer`, which asks the tokenizer itself.

- bytes: `ByteLevel` (GPT-2, Llama 3, Qwen): a piece is some bytes of a UTF-8 stream.
- strings: `Metaspace`, `Replace`/`ByteFallback`/`Fuse`/`Strip` (SentencePiece), or no decoder: a piece is a string, or
  one byte of a run; at the start of the text some spaces fall away.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HFTokenizer


@dataclass(frozen=True, slots=True, eq=False)
class BytePieces:
    """Bytes by id; None for ids that leave no trace (skipped, or unknown to the tokenizer)."""

    pieces: list[bytes | None]
    texts: list[str | None]
    """The same as text where the bytes are whole characters on their own."""


@dataclass(frozen=True, slots=True, eq=False)
class StringPieces:
    """Strings by id, or an int where the token stands for one byte of a run; None for ids that leave no trace."""

    pieces: list[str | int | None]
    first_pieces: list[str | int | None]
    """The same for a token that is the first of the text."""
    strip_char: str
    num_strip: int
    """So many of `strip_char` fall away at the very start of the text."""


@dataclass(frozen=True, slots=True)
class _StringRules:
    """A linear string decoder in four settings."""

    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    drop_in_first: str = ""
    space_before: bool = False
    strip_char: str = " "
    num_strip: int = 0


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (Radford et al., 2019): character → byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    shifted = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + number): byte for number, byte in enumerate(shifted)})
    return alphabet


def pieces_of(tokenizer: HFTokenizer, *, skip_special_tokens: bool) -> BytePieces | StringPieces | None:
    """The piece table of `tokenizer`, or None when its decoder is of no linear kind known here."""
    decoder = json.loads(tokenizer.to_str()).get("decoder")
    tokens = _tokens_by_id(tokenizer, skip_special_tokens=skip_special_tokens)
    if _is_byte_level(decoder):
        alphabet = byte_level_alphabet()
        pieces = [None if token is None else _bytes_of(token, alphabet) for token in tokens]
        return BytePieces(pieces=pieces, texts=[_whole_text(piece) for piece in pieces])
    rules = _string_rules(decoder)
    if rules is None:
        return None
    return StringPieces(
        pieces=[_string_piece(token, rules, first=False) for token in tokens],
        first_pieces=[_string_piece(token, rules, first=True) for token in tokens],
        strip_char=rules.strip_char,
        num_strip=rules.num_strip,
    )


def _tokens_by_id(tokenizer: HFTokenizer, *, skip_special_tokens: bool) -> list[str | None]:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder()
    size = 1 + max([*vocabulary.values(), *added], default=-1)
    special = {token.content for token in added.values() if token.special} if skip_special_tokens else set()
    tokens: list[str | None] = [None] * size
    for token, index in vocabulary.items():
        tokens[index] = token
    for index, added_token in added.items():
        tokens[index] = added_token.content
    return [None if token in special else token for token in tokens]


def _is_byte_level(decoder: Any) -> bool:
    if not isinstance(decoder, dict):
        return False
    if decoder["type"] == "Sequence":
        return len(decoder["decoders"]) == 1 and _is_byte_level(decoder["decoders"][0])
    return bool(decoder["type"] == "ByteLevel")


def _bytes_of(token: str, alphabet: dict[str, int]) -> bytes:
    # Added tokens may hold characters outside the alphabet; the library then takes the token's own UTF-8.
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:
        return token.encode("utf-8")


def _whole_text(piece: bytes | None) -> str | None:
    if piece is None:
        return ""
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _string_rules(decoder: Any) -> _StringRules | None:
    """The rules of a linear string decoder; None when there is a step that is not linear or not known."""
    if decoder is None:
        return _StringRules(space_before=True)  # without a decoder the library joins tokens by spaces
    if decoder["type"] == "Metaspace":
        drops = decoder.get("prepend_scheme", "always") != "never"
        mark = decoder["replacement"]
        return _StringRules(replacements=((mark, " "),), drop_in_first=mark if drops else "")
    if decoder["type"] != "Sequence":
        return None
    replacements: list[tuple[str, str]] = []
    byte_fallback, fused, num_strip, strip_char = False, False, 0, " "
    for step in decoder["decoders"]:
        kind = step["type"]
        if kind == "Replace" and not byte_fallback and not fused and "String" in step["pattern"]:
            replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "ByteFallback" and not byte_fallback and not fused:
            byte_fallback = True
        elif kind == "Fuse" and not num_strip:
            fused = True
        elif kind == "Strip" and fused and not num_strip and step["stop"] == 0:
            num_strip, strip_char = step["start"], step["content"]
        else:
            return None
    return _StringRules(
        replacements=tuple(replacements), byte_fallback=byte_fallback, strip_char=strip_char, num_strip=num_strip
    )


def _string_piece(token: str | None, rules: _StringRules, *, first: bool) -> str | int | None:
    if token is None:
        return None
    if first and rules.drop_in_first:
        token = token.replace(rules.drop_in_first, "")
    for pattern, content in rules.replacements:
        token = token.replace(pattern, content)
    if rules.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return token
    return " " + token if rules.space_before and not first else token
