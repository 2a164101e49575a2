"""The Python standard library's sources as a corpus, and byte-level BPE tokenizers trained on them.

The same files in the same order on every machine with the same Python version: sorted paths, tests and tables left
out, and a fixed twentieth of the files (chosen by a hash of the path) held out for measuring perplexity.
"""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

# Tests are not what one writes, character tables and generated documentation are not code, and the others are
# whatever else happens to be installed in the same folder.
SKIPPED_PARTS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "_bundled"}
)
HELD_OUT_SHARE = 1 / 20

USER, ASSISTANT, SYSTEM = "<|user|>", "<|assistant|>", "<|system|>"
BOS, EOS = "<s>", "</s>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] | trim + '\n' }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of the corpus: its path relative to the standard library, and its text."""

    path: str
    text: str

    @property
    def is_held_out(self) -> bool:
        """Depends on the path alone, so a file is held out (or not) in every version of Python."""
        return hashlib.sha256(self.path.encode()).digest()[0] < 256 * HELD_OUT_SHARE


def read_stdlib(root: Path | None = None) -> list[SourceFile]:
    """Every usable source file of the standard library, sorted by path.

    Raises FileNotFoundError where the folder holds no Python sources (some distributions ship only bytecode).
    """
    folder = root if root is not None else Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(folder.rglob("*.py"), key=lambda p: p.relative_to(folder).as_posix()):
        relative = path.relative_to(folder)
        if SKIPPED_PARTS.intersection(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a handful of old modules declare another encoding
        if text.strip():
            files.append(SourceFile(path=relative.as_posix(), text=text))
    if not files:
        raise FileNotFoundError(f"no Python sources under {folder}: install the full standard library")
    return files


def train_tokenizer(
    texts: Sequence[str] | Iterator[str], *, vocab_size: int, special_tokens: Sequence[str], add_bos: bool
) -> Tokenizer:
    """A byte-level BPE tokenizer: every string of bytes has an encoding and decodes to itself.

    `special_tokens` get the ids 0, 1, 2 …; with `add_bos` the first of them is put before every encoded text.
    """
    tokenizer = Tokenizer(models.BPE())
    # A line break is a token of its own: a prompt that ends with one reads like the text that the model was trained on,
    # where otherwise break and indentation would have been one token.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(texts), trainer)
    if add_bos:
        bos = special_tokens[0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def split_at_definitions(text: str, rng: random.Random, chance: float) -> list[str]:
    """Cuts a file before some of its top-level definitions, so that a document may begin with `def` or `class`."""
    pieces: list[str] = []
    current: list[str] = []
    for line in text.splitlines(keepends=True):
        if current and line.startswith(("def ", "class ", "@", "async def ")):
            decorated = current[-1].startswith("@")
            if not decorated and rng.random() < chance:
                pieces.append("".join(current))
                current = []
        current.append(line)
    pieces.append("".join(current))
    return [stripped for piece in pieces if (stripped := piece.strip("\n") + "\n").strip()]


def chat_samples(text: str) -> list[tuple[str, str]]:
    """Pairs of (what a person might ask, the function that answers it), one for each documented function of a file."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return []  # lib2to3 and others keep templates that are not quite Python
    lines = text.splitlines(keepends=True)
    samples = []
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or not (doc := ast.get_docstring(node)):
            continue
        summary = doc.split("\n\n")[0].replace("\n", " ").strip()
        code = "".join(lines[node.lineno - 1 : node.end_lineno])
        samples.append((f"Write a Python function {node.name}: {summary}", code))
    return samples


def render_chat(question: str, answer: str) -> str:
    """What CHAT_TEMPLATE makes of one question and its answer, without the surrounding <s> and </s>."""
    return f"{USER}\n{question.strip()}\n{ASSISTANT}\n{answer.strip()}\n"
