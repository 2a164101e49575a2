from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pageflight.backend.generations import GenerationBuilder, TokenWishes
from pageflight.backend.inputs import as_word_list, word_list
from pageflight.backend.options import Options
from pageflight.core.errors import InvalidArgument, PromptTooLong, Unsupported
from pageflight.loop.open_sequence import request_of

EOS = 3


def sampling(builder: GenerationBuilder, **options: object):  # type: ignore[no-untyped-def]
    wanted = Options()
    for name, value in options.items():
        wanted.add(name, value)
    return builder.build((1, 2), wanted).sampling


def test_greedy_unless_randomness_is_asked_for(builder: GenerationBuilder) -> None:
    assert sampling(builder).temperature == 0.0
    assert sampling(builder, top_k=1, temperature=0.7).temperature == 0.0
    assert sampling(builder, temperature=0.0, top_p=0.5).temperature == 0.0


@pytest.mark.parametrize("option", [{"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"seed": 4}])
def test_any_sampling_option_means_temperature_one(builder: GenerationBuilder, option: dict[str, object]) -> None:
    assert sampling(builder, **option).temperature == 1.0


def test_checkpoint_that_samples_sets_the_defaults(builder: GenerationBuilder) -> None:
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50}
    manifest = replace(builder.manifest, generation=generation)
    other = GenerationBuilder(manifest, builder.tokenizer, default_max_tokens=64, exclude_input_in_output=True)
    made = sampling(other)
    assert (made.temperature, made.top_p, made.top_k) == (0.6, 0.9, 50)
    made = sampling(other, temperature=0.2)
    assert (made.temperature, made.top_p, made.top_k) == (0.2, 0.9, 50)
    made = sampling(other, seed=3)
    assert (made.temperature, made.top_p, made.top_k) == (0.6, 0.9, 50)
    assert sampling(other, top_k=0).top_k == 0


@pytest.mark.parametrize("option", [{"top_k": 0}, {"top_k": -1}, {"top_p": 1.0}, {"min_p": 0.0}])
def test_naming_the_value_that_is_off_stays_greedy(builder: GenerationBuilder, option: dict[str, object]) -> None:
    """Clients that always send their neutral defaults got another text every time."""
    assert sampling(builder, **option).temperature == 0.0


def test_a_minimum_above_the_default_length_raises_it(builder: GenerationBuilder) -> None:
    """A default that the client had not chosen made its request fail."""
    assert sampling(builder, min_tokens=80).max_tokens == 80


def test_a_prompt_of_endless_long_tokens_is_refused_without_reading_it(builder: GenerationBuilder) -> None:
    """A megabyte of "=" was tokenised whole, and every stream of the model stood still meanwhile."""
    assert 0 < builder.tokenizer.fewest_tokens("=" * 10_000_000) <= 10_000_000
    for text in ("=" * 1000, "def f(x):\n    return x\n" * 50, "é漢🙂" * 100):
        assert builder.tokenizer.fewest_tokens(text) <= len(builder.tokenizer.encode(text, add_special_tokens=False))


def test_unseeded_requests_differ(builder: GenerationBuilder) -> None:
    assert len({sampling(builder, temperature=1.0).seed for _ in range(5)}) == 5
    assert sampling(builder, seed=2**64 - 1).seed == 2**64 - 1


def test_end_id_replaces_the_models_own(builder: GenerationBuilder) -> None:
    assert sampling(builder).stop_token_ids == (EOS,)
    assert sampling(builder, end_id=9).stop_token_ids == (9,)
    assert sampling(builder, end_id=-1).stop_token_ids == ()
    assert sampling(builder, ignore_eos=True).stop_token_ids == ()
    with pytest.raises(Unsupported, match="ignore_eos"):
        sampling(builder, ignore_eos=True, end_id=9)


def test_default_length_fits_what_is_left_of_the_model(builder: GenerationBuilder) -> None:
    """The default was added to a long prompt, and requests without max_tokens were refused as too long."""
    assert builder.build(tuple(range(10)), Options()).sampling.max_tokens == 64
    assert builder.build((1,) * 90, Options()).sampling.max_tokens == 10


def test_streamed_answer_cannot_start_with_the_prompt(builder: GenerationBuilder) -> None:
    with pytest.raises(Unsupported, match="exclude_input_in_output"):
        options = Options()
        options.add("stream", True)
        options.add("exclude_input_in_output", False)
        builder.build((1,), options)


def test_bad_words_are_forbidden_after_a_space_too(builder: GenerationBuilder) -> None:
    ids = sampling(builder, bad_words=["fox"]).bad_words_ids
    assert builder.encode_word("fox") in ids
    assert builder.encode_word(" fox") in ids


def test_bias_adds_up_over_its_sources(builder: GenerationBuilder) -> None:
    options = Options(logit_bias={5: 1.0})
    (five,) = (index for index in range(builder.manifest.vocab_size) if index == 5)
    made = builder.build((1,), options, TokenWishes(logit_bias=((five, 2.0),)))
    assert made.sampling.logit_bias == ((5, 3.0),)
    with pytest.raises(InvalidArgument, match="logit_bias=100000"):
        builder.build((1,), Options(logit_bias={100000: 1.0}))


def test_huge_prompt_is_refused_before_it_is_read(builder: GenerationBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    encode = builder.tokenizer.encode

    def counting(text: str, **options: bool) -> list[int]:
        read.append(len(text))
        return encode(text, **options)

    monkeypatch.setattr(builder.tokenizer, "encode", counting)
    with pytest.raises(PromptTooLong, match="1000000 characters"):
        builder.encode_prompt("text_input", "ab" * 500_000)
    assert max(read, default=0) < 10_000


def test_word_lists_survive_their_form() -> None:
    words = ((1, 2, 3), (4,), (5, 6))
    assert word_list("stop_words_list", as_word_list(words)) == words
    assert word_list("stop_words_list", as_word_list(())) == ()
    padded = np.pad(as_word_list(words), ((0, 0), (0, 5)), constant_values=-1)
    assert word_list("stop_words_list", padded) == words


def test_broken_word_lists_are_refused() -> None:
    for broken in ([[1, 2], [3, -1]], [[1, 2], [2, 1]]):
        with pytest.raises(InvalidArgument, match="bad_words_list"):
            word_list("bad_words_list", np.array(broken, dtype=np.int32))
    with pytest.raises(InvalidArgument, match="shape"):
        word_list("bad_words_list", np.zeros((3, 2), np.int32))


def test_the_retention_priority_reaches_the_scheduler(builder: GenerationBuilder) -> None:
    """Without a wish the blocks that a request finds keep the priority that they have."""
    for given, expected in ((None, None), (0, 0), (80, 80)):
        options = Options()
        if given is not None:
            options.add("kv_retention_priority", given)
        assert request_of(builder.build((1, 2), options), handle=1).kv_retention_priority == expected
    with pytest.raises(InvalidArgument, match="from 0 to 100"):
        Options().add("kv_retention_priority", 101)
