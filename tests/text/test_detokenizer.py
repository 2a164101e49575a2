"""Incremental detokenizing against the library's full decode."""

from __future__ import annotations

import codecs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import ALL, CORPUS, LINEAR, byte_level, metaspace, sentencepiece_bpe

from pageflight.text.detokenizer import ByteDetokenizer, StringDetokenizer, WindowDetokenizer
from pageflight.text.tokenizer import SpecialTokens, Tokenizer

NO_SPECIAL = SpecialTokens(strings={}, bos_id=None, eos_ids=(), pad_id=None)


def wrapped(kind: str) -> Tokenizer:
    return Tokenizer(ALL[kind](), NO_SPECIAL)


def deltas(tokenizer: Tokenizer, prompt: list[int], groups: list[list[int]], *, skip: bool = True) -> list[str]:
    state = tokenizer.detokenizer(prompt, skip_special_tokens=skip)
    return [*(state.feed(group) for group in groups), state.flush()]


def is_whole(prompt_text: str) -> bool:
    return not prompt_text.endswith("�")


ids = st.lists(st.integers(0, 440), max_size=24)  # ids beyond the vocabulary included


@pytest.mark.parametrize("kind", LINEAR)
@settings(max_examples=250, deadline=None)
@given(
    prompt=ids, groups=st.lists(st.lists(st.integers(0, 440), min_size=1, max_size=4), max_size=14), skip=st.booleans()
)
def test_joined_deltas_equal_the_full_decode_for_random_ids(
    kind: str, prompt: list[int], groups: list[list[int]], skip: bool
) -> None:
    """A stateless detokenizer lost leading spaces and cut characters at token borders; random ids meet every border:
    broken bytes, special tokens between the bytes of a character, ids that no token has."""
    tokenizer = wrapped(kind)
    output = [index for group in groups for index in group]
    prompt_text = tokenizer.decode(prompt, skip_special_tokens=skip)
    whole = tokenizer.decode(prompt + output, skip_special_tokens=skip)
    if is_whole(prompt_text) and whole.startswith(prompt_text):
        assert "".join(deltas(tokenizer, prompt, groups, skip=skip)) == whole[len(prompt_text) :]


@pytest.mark.parametrize("kind", ALL)
@settings(max_examples=120, deadline=None)
@given(
    text=st.text(st.sampled_from("".join(sorted(set("".join(CORPUS)))) + "🙂e\u0301\u0302漢"), max_size=60),
    cut=st.integers(0, 60),
)
def test_joined_deltas_equal_the_full_decode_for_encoded_text(kind: str, text: str, cut: int) -> None:
    tokenizer = wrapped(kind)
    everything = tokenizer.encode(text)
    prompt, output = everything[:cut], everything[cut:]
    prompt_text, whole = tokenizer.decode(prompt), tokenizer.decode(everything)
    if is_whole(prompt_text) and whole.startswith(prompt_text):
        assert "".join(deltas(tokenizer, prompt, [[index] for index in output])) == whole[len(prompt_text) :]


@settings(max_examples=150, deadline=None)
@given(groups=st.lists(st.lists(st.integers(0, 440), min_size=1, max_size=4), max_size=14))
def test_grouping_of_tokens_does_not_change_the_text(groups: list[list[int]]) -> None:
    """Joined frames feed several ids at once; the text must be that of single ids."""
    output = [index for group in groups for index in group]
    for kind in LINEAR:
        tokenizer = wrapped(kind)
        one_by_one = "".join(deltas(tokenizer, [], [[index] for index in output]))
        assert "".join(deltas(tokenizer, [], groups)) == one_by_one


def test_no_delta_holds_part_of_a_character() -> None:
    """An emoji of four byte tokens came out as four replacement characters."""
    for kind in ("byte_level", "sentencepiece_bpe"):
        tokenizer = wrapped(kind)
        text = "the 🦊 漢字 e\u0301"
        pieces = deltas(tokenizer, [], [[index] for index in tokenizer.encode(text)])
        assert "".join(pieces).strip() == text and all("�" not in piece for piece in pieces)


def test_the_space_before_the_first_generated_word_survives() -> None:
    """Decoding the completion alone strips the space of its first word, so `def` + ` f` became `deff`."""
    for make in (sentencepiece_bpe, metaspace):
        tokenizer = Tokenizer(make(), NO_SPECIAL)
        prompt = tokenizer.encode("the")
        space = next(i for i in range(tokenizer.vocab_size) if (make().id_to_token(i) or "") in ("▁t", "▁the", "▁"))
        assert "".join(deltas(tokenizer, prompt, [[space]])).startswith(" ")


def test_without_a_prompt_the_leading_space_is_stripped_as_in_the_full_decode() -> None:
    tokenizer = wrapped("sentencepiece_bpe")
    output = tokenizer.encode("the the")
    assert "".join(deltas(tokenizer, [], [[index] for index in output])) == "the the"


def test_an_unfinished_character_becomes_a_replacement_character_at_the_end() -> None:
    tokenizer = wrapped("byte_level")
    fox = tokenizer.encode("🦊")
    assert len(fox) > 1
    assert deltas(tokenizer, [], [[index] for index in fox[:-1]])[-1] == "�"


def test_a_character_begun_in_the_prompt_belongs_to_the_output() -> None:
    for kind in ("byte_level", "sentencepiece_bpe"):
        tokenizer = wrapped(kind)
        everything = tokenizer.encode("the 🦊")
        assert "".join(deltas(tokenizer, everything[:-1], [everything[-1:]])) == "🦊"


def test_special_tokens_are_skipped_or_shown() -> None:
    tokenizer = wrapped("byte_level")
    end = tokenizer.token_to_id("</s>")
    assert end is not None
    assert "".join(deltas(tokenizer, [], [[end]], skip=True)) == ""
    assert "".join(deltas(tokenizer, [], [[end]], skip=False)) == "</s>"


def test_each_decoder_kind_gets_its_table() -> None:
    """A table kind that silently falls back to the window would still be right, and several times slower."""
    expected = {
        "byte_level": ByteDetokenizer,
        "sentencepiece_bpe": StringDetokenizer,
        "metaspace": StringDetokenizer,
        "no_decoder": StringDetokenizer,
        "word_suffix": WindowDetokenizer,
    }
    assert {kind: type(wrapped(kind).detokenizer()) for kind in ALL} == expected


def test_a_stream_without_text_does_not_grow_the_window() -> None:
    """Skipped special tokens never produced text, so the window kept every one of them."""
    tokenizer = wrapped("word_suffix")
    end = tokenizer.token_to_id("</s>")
    assert end is not None
    state = tokenizer.detokenizer()
    assert isinstance(state, WindowDetokenizer)
    for _ in range(10 * WindowDetokenizer.MAX_HELD):
        state.feed([end])
    assert len(state._ids) <= 2 * WindowDetokenizer.MAX_HELD


@settings(max_examples=400, deadline=None)
@given(data=st.binary(max_size=12), cut=st.integers(0, 12))
def test_incremental_replacement_equals_replacement_of_the_whole(data: bytes, cut: int) -> None:
    """The byte detokenizer rests on this property of the standard library's decoder."""
    text, used = codecs.utf_8_decode(data[:cut], "replace", False)
    assert text + (data[used:]).decode("utf-8", "replace") == data.decode("utf-8", "replace")


def test_byte_alphabet_is_the_librarys() -> None:
    tokenizer = byte_level()
    for text in ("\x00\x01\xff ", "ÿ€🦊", "\n\t"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
