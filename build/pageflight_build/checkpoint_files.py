"""The small files of a checkpoint: tokenizer, chat template, defaults of generation; read, checked and carried over."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pageflight.core.errors import CheckpointError
from pageflight.models.config import DecoderConfig
from pageflight.models.hf_entries import Entries, read_entries

TOKENIZER_FOLDER = "tokenizer"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
)
_TEMPLATES = "additional_chat_templates"
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "top_k", "max_new_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFacts:
    """What tokenizer and generation files say that the engine's manifest must carry."""

    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    add_bos: bool
    generation: dict[str, Any]
    has_chat_template: bool


def read_text_facts(folder: Path, config: DecoderConfig) -> TextFacts:
    """Read what stands beside the weights. Raises CheckpointError naming file, entry and what is expected."""
    tokenizer = _load_tokenizer(folder / "tokenizer.json")
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= config.vocab_size:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'} has {size} tokens with ids up to {largest}, but config.json says"
            f" vocab_size={config.vocab_size}: tokenizer and weights are not of the same model"
        )
    settings = _optional(folder / "tokenizer_config.json")
    generation = _optional(folder / "generation_config.json")
    eos = generation.token_ids("eos_token_id", config.vocab_size) or config.eos_token_ids
    named = _named_token(settings, "eos_token")
    named_id = tokenizer.token_to_id(named) if named else None
    if named_id is not None and named_id not in eos:
        eos = (*eos, named_id)
    bos = config.bos_token_id
    if bos is None and (name := _named_token(settings, "bos_token")):
        bos = tokenizer.token_to_id(name)
    pad = generation.token_id("pad_token_id", config.vocab_size)
    start = tokenizer.encode("a", add_special_tokens=True).ids[:1]
    return TextFacts(
        bos_token_id=bos,
        eos_token_ids=eos,
        pad_token_id=config.pad_token_id if pad is None else pad,
        add_bos=bos is not None and start == [bos],
        generation=_generation_defaults(generation),
        has_chat_template=bool(settings.data.get("chat_template")) or (folder / "chat_template.jinja").is_file(),
    )


def copy_text_files(folder: Path, target: Path) -> None:
    """Copy the files that tokenizing and chat templates need into `target`, which must not exist yet."""
    target.mkdir(parents=True)
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    if (folder / _TEMPLATES).is_dir():
        shutil.copytree(folder / _TEMPLATES, target / _TEMPLATES, copy_function=shutil.copyfile)


def _load_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: a checkpoint needs its fast tokenizer"
            " (AutoTokenizer.from_pretrained(…).save_pretrained(…) of transformers writes it)"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every kind of damage
        raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from None


def _optional(path: Path) -> Entries:
    return read_entries(path) if path.is_file() else Entries(path, {})


def _named_token(settings: Entries, name: str) -> str | None:
    token = settings.data.get(name)
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _generation_defaults(entries: Entries) -> dict[str, Any]:
    """`do_sample` and the numbers beside it, as far as they are set."""
    found: dict[str, Any] = {"do_sample": entries.flag("do_sample")} if entries.data else {}
    for name in _NUMBERS:
        value = entries.data.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**31:
            raise entries.refuse(name, "must be a number of at least 0")
        found[name] = value
    return found
