import random

import pytest
from stdlib_corpus import (
    CHAT_TEMPLATE,
    SourceFile,
    chat_samples,
    read_stdlib,
    render_chat,
    split_at_definitions,
    train_tokenizer,
)

MODULE = '''"""Doc."""
import os


@cached
def read(path):
    """Reads a file.

    All of it.
    """
    return open(path).read()


class Thing:
    def method(self):
        return 1
'''


def test_the_corpus_is_sorted_and_holds_neither_tests_nor_tables() -> None:
    """Folder order differs between file systems: the same seed trained another tokenizer on another machine."""
    paths = [file.path for file in read_stdlib()]
    assert paths == sorted(paths)
    assert "json/decoder.py" in paths
    assert not [path for path in paths if {"test", "tests", "idle_test", "site-packages"} & set(path.split("/"))]
    assert not [path for path in paths if path.startswith(("encodings/", "pydoc_data/"))]


def test_about_a_twentieth_is_held_out_by_path_alone() -> None:
    """A choice by position would move files between the halves with every new Python version."""
    files = read_stdlib()
    held_out = [file for file in files if file.is_held_out]
    assert 0.02 < len(held_out) / len(files) < 0.09
    assert all(SourceFile(path=file.path, text="other").is_held_out for file in held_out)


def test_an_empty_library_is_an_error_that_names_the_folder(tmp_path) -> None:
    """Distributions without sources trained a tokenizer on nothing."""
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        read_stdlib(tmp_path)


def test_pieces_of_a_file_begin_at_definitions_and_keep_decorators() -> None:
    """A piece that ended with `@cached` taught the model to stop after decorators."""
    pieces = split_at_definitions(MODULE, random.Random(0), chance=1.0)
    assert [piece.splitlines()[0] for piece in pieces] == ['"""Doc."""', "@cached", "class Thing:"]
    assert split_at_definitions(MODULE, random.Random(0), chance=0.0) == [MODULE]


def test_chat_samples_ask_for_documented_functions() -> None:
    """The answer is the function itself; its summary's first paragraph is the question."""
    [(question, answer)] = chat_samples(MODULE)
    assert question == "Write a Python function read: Reads a file."
    assert answer.startswith("def read(path):")
    assert chat_samples("def broken(:") == []


def test_the_chat_template_renders_what_the_model_was_trained_on() -> None:
    """A template with one newline more than the training texts gives an answer from nowhere."""
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(CHAT_TEMPLATE)
    messages = [{"role": "user", "content": " question "}, {"role": "assistant", "content": "answer"}]
    whole = template.render(messages=messages, bos_token="<s>", eos_token="</s>")
    assert whole == f"<s>{render_chat('question', 'answer')}</s>"
    asked = template.render(messages=messages[:1], bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
    assert whole.startswith(asked)


def test_a_tokenizer_gives_back_any_text() -> None:
    """Byte-level BPE has no unknown token, whatever it was trained on."""
    tokenizer = train_tokenizer([MODULE] * 4, vocab_size=300, special_tokens=["<s>", "</s>"], add_bos=True)
    ids = tokenizer.encode("def größe(): return '🙂'").ids
    assert ids[0] == 0
    assert tokenizer.decode(ids) == "def größe(): return '🙂'"
