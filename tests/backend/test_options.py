from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageflight.backend.options import Options, as_text
from pageflight.core import wire
from pageflight.core.errors import InvalidArgument, Unsupported


def test_numbers_and_flags_may_be_spelt_as_text_in_parameters() -> None:
    """vllm_backend's clients send every number as a string."""
    options = Options()
    options.add_parameters({"temperature": "0.5", "max_tokens": "7", "stream": "true", "ignore_eos": False})
    assert options.values == {"temperature": 0.5, "max_tokens": 7, "stream": True, "ignore_eos": False}


def test_numbers_spelt_as_text_are_refused_in_tensors() -> None:
    with pytest.raises(InvalidArgument, match="max_tokens"):
        Options().add("max_tokens", "7")


def test_same_option_twice_must_agree() -> None:
    options = Options()
    options.add("temperature", 0.10000000149011612)  # 0.1 through a 32-bit tensor
    options.add_parameters({"temperature": "0.1"})
    with pytest.raises(InvalidArgument, match="also given as"):
        options.add_parameters({"temperature": 0.2})


def test_aliases_are_the_same_option() -> None:
    options = Options()
    options.add("min_length", 4)
    assert options.get("min_tokens") == 4
    with pytest.raises(InvalidArgument, match="runtime_top_k"):
        options.add("runtime_top_k", -9)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "nan", "inf"])
def test_only_finite_numbers_are_numbers(value: object) -> None:
    with pytest.raises(InvalidArgument, match="temperature"):
        Options().add("temperature", value, from_text=True)


@pytest.mark.parametrize("name", [o.name for o in wire.OPTIONS.values() if o.unsupported])
def test_what_is_not_built_is_refused_by_name(name: str) -> None:
    option = wire.OPTIONS[name]
    wrong = {"BOOL": True, "INT32": 4, "UINT64": 5, "FP32": 0.5, "STRING": (option.choices or ("x",))[0]}[option.dtype]
    with pytest.raises(Unsupported, match=f"{name}=.*not supported"):
        Options().add(name, wrong)
    for neutral in option.neutral:
        Options().add(name, neutral)


def test_lists_come_as_json_text_or_as_one_word() -> None:
    options = Options()
    options.add_parameters({"stop_words": '["a", "b"]', "bad_words": "just one"})
    assert options.get("stop_words") == ("a", "b")
    assert options.get("bad_words") == ("just one",)


def test_vllm_names_lead_to_our_options() -> None:
    entries = {"n": "2", "stop": ["."], "logit_bias": {"5": 2.5}, "stop_token_ids": [7], "seed": None, "logprobs": 1}
    options = Options()
    options.add("sampling_parameters", json.dumps(entries))
    assert options.values == {
        "num_return_sequences": 2,
        "stop_words": (".",),
        "stop_token_ids": (7,),
        "return_log_probs": True,
    }
    assert options.logit_bias == {5: 2.5}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ('{"use_beam_search": true}', "use_beam_search"),
        ('{"logprobs": 5}', "logprobs=5"),
        ('{"prompt_logprobs": 1}', "prompt_logprobs"),
        ('{"no_such": 1}', "no_such"),
        ('{"sampling_parameters": "{}"}', "itself"),
        ('{"logit_bias": [1]}', "logit_bias"),
        ("[1]", "JSON object"),
    ],
)
def test_vllm_parameters_that_cannot_be_honoured_are_refused(entries: str, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        Options().add("sampling_parameters", entries)


@pytest.mark.parametrize(
    "text",
    [
        '{"temperature": 1' + "0" * 400 + "}",
        '{"top_p": [' + "1" * 400 + "]}",
        '{"seed": 1' + "0" * 400 + "}",
        '{"logit_bias": {"5": 1' + "0" * 400 + "}}",
        '{"temperature": 1' + "0" * 5000 + "}",
    ],
)
def test_numbers_beyond_any_float_are_refused_by_name(text: str) -> None:
    """OverflowError, and the client was told to look into the server's log."""
    with pytest.raises(InvalidArgument, match=r"temperature|top_p|seed|logit_bias|sampling_parameters"):
        Options().add("sampling_parameters", text)


@pytest.mark.parametrize("name", ["sampling_parameters", "stop_words", "logit_bias", "stop_token_ids"])
@pytest.mark.parametrize("levels", [5, 200, 900, 100_000])
def test_deep_json_is_refused_by_name(name: str, levels: int) -> None:
    """RecursionError: while it was read, or while the error that refused it was written."""
    for text in ("[" * levels, "[" * levels + "]" * levels, '{"a":' * levels + "1" + "}" * levels):
        with pytest.raises(InvalidArgument, match=name):
            Options().add_parameters({name: "[" + text + "]" if name.startswith("stop") else text})


def test_empty_words_are_no_words() -> None:
    """TensorRT-LLM's documented request has `"bad_words": "", "stop_words": ""` and was refused."""
    options = Options()
    options.add("bad_words", [b""])
    options.add_parameters({"stop_words": ""})
    options.add("embedding_bias_words", [b""])
    assert options.get("bad_words") == options.get("stop_words") == options.get("embedding_bias_words") == ()
    options = Options()
    options.add_parameters({"stop": ["fine", ""]})
    assert options.get("stop_words") == ("fine",)


def test_empty_bias_word_goes_with_its_weight() -> None:
    values = {"embedding_bias_words": ["a", "", "b"], "embedding_bias_weights": [1.0, 2.0, 3.0]}
    for order in (list(values), list(values)[::-1]):
        options = Options()
        for name in order:
            options.add(name, values[name])
        assert options.get("embedding_bias_words") == ("a", "b")
        assert options.get("embedding_bias_weights") == (1.0, 3.0)


def test_weights_without_their_words_stay_to_be_refused() -> None:
    options = Options()
    options.add("embedding_bias_weights", [1.0])
    options.add("embedding_bias_words", ["", ""])
    assert len(options.get("embedding_bias_weights")) != len(options.get("embedding_bias_words"))


def test_envelope_of_benchmark_clients_is_no_option() -> None:
    options = Options()
    options.add_parameters({"id": "7", "model": "m", "sequence_id": 0, "sequence_start": False})
    assert options.values == {}


def test_text_must_be_unicode() -> None:
    with pytest.raises(InvalidArgument, match="byte 2"):
        as_text("text_input", b"ab\xff")
    with pytest.raises(InvalidArgument, match="Unicode"):
        as_text("text_input", "\ud800")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(name=st.sampled_from([*wire.OPTIONS, *wire.ALIASES, "logit_bias", "n", "stop", "nonsense"]), value=JSON)
def test_any_parameter_is_taken_or_refused_by_name(name: str, value: object) -> None:
    """A list where a number was expected ended in a TypeError, and the client got a traceback."""
    options = Options()
    try:
        options.add_parameters({name: value})
    except InvalidArgument as error:
        assert str(error)
    for kept, checked in options.values.items():
        option = wire.OPTIONS[kept]
        for number in checked if isinstance(checked, tuple) else (checked,):
            if option.minimum is not None:
                assert option.minimum <= number
            if option.maximum is not None:
                assert number <= option.maximum
