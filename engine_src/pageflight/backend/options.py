"""From what a client sent, in whatever form, to checked options under their canonical names.

Options arrive as tensors, as request parameters (JSON scalars, or text that spells a number or a list), and inside
vllm_backend's `sampling_parameters`. Whatever is unknown, out of range or not built is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pageflight.core import wire
from pageflight.core.errors import InvalidArgument, Unsupported

_TRUE, _FALSE = ("true", "True", "1"), ("false", "False", "0")

_ENVELOPE = ("id", "model", "sequence_id", "sequence_start", "sequence_end")
"""Request parameters that are Triton's or of benchmark clients' envelopes, not wishes about the answer."""

_VLLM_NAMES = {
    "n": "num_return_sequences",
    "stop": "stop_words",
    "bad_words": "bad_words",
    "stop_token_ids": "stop_token_ids",
    "skip_special_tokens": "skip_special_tokens",
}
_VLLM_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "detokenize": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "best_of": (1, "1"),
    "logits_processors": (),
    "guided_decoding": (),
}
"""vLLM's sampling parameters that are accepted only where they ask for nothing."""

_BIAS_WORDS, _BIAS_WEIGHTS = "embedding_bias_words", "embedding_bias_weights"

_MAX_JSON_DEPTH = 4
"""Levels of lists and objects in an option's JSON text; what any option means has two."""


@dataclass(slots=True)
class Options:
    """Checked values by canonical option name; `logit_bias` from `sampling_parameters` by token id; how the client
    spelt each option, by canonical name."""

    values: dict[str, Any] = field(default_factory=dict)
    logit_bias: dict[int, float] = field(default_factory=dict)
    spellings: dict[str, str] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        """The value; of the lists of bias words and weights, without the empty words and their weights."""
        assert name in wire.OPTIONS, name
        if name in (_BIAS_WORDS, _BIAS_WEIGHTS) and name in self.values:
            return self._bias_of_words(name)
        return self.values.get(name, default)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def add(self, spelling: str, value: Any, *, name: str = "", from_text: bool = False) -> None:
        """Check one option and keep it. `name` is its canonical name, where `spelling` is no alias of it; with
        `from_text` numbers and flags may be spelt as text.

        Raises InvalidArgument or Unsupported, also when the option was given before with another value.
        """
        name = name or wire.ALIASES.get(spelling, spelling)
        option = wire.OPTIONS.get(name)
        if option is None:
            raise InvalidArgument(spelling, value, "there is no such option")
        checked = check(option, spelling, value, from_text=from_text)
        if option.unsupported:
            return
        if name == "sampling_parameters":
            self._add_vllm(checked)
            return
        if name == "top_k" and checked == -1:
            checked = 0
        self.spellings.setdefault(name, spelling)
        known = self.values.setdefault(name, checked)
        if not _same(known, checked):
            raise InvalidArgument(spelling, checked, f"was also given as {known!r}")

    def add_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Request parameters of the KServe protocol. Raises like `add`."""
        for name, value in parameters.items():
            if name in _ENVELOPE:
                continue
            if name in _VLLM_NAMES or name in _VLLM_NEUTRAL or name in ("logit_bias", "logprobs"):
                self._add_vllm_entry(name, value)
            else:
                self.add(name, value, from_text=True)

    def _add_vllm(self, text: str) -> None:
        entries = _from_json("sampling_parameters", text)
        if not isinstance(entries, dict):
            raise InvalidArgument("sampling_parameters", text, "must be a JSON object")
        for name, value in entries.items():
            if name == "sampling_parameters":
                raise InvalidArgument(name, value, "must not contain itself")
            self._add_vllm_entry(name, value)

    def _add_vllm_entry(self, name: str, value: Any) -> None:
        if value is None:
            return  # vLLM's own default
        if name in _VLLM_NEUTRAL:
            plain = {"true": True, "false": False}.get(str(value).lower(), value)
            if plain not in _VLLM_NEUTRAL[name]:
                raise Unsupported(name, value, "not supported by this build")
        elif name == "logit_bias":
            self._add_logit_bias(value)
        elif name == "logprobs":
            if value not in (False, 0, 1, "0", "1", True):
                raise Unsupported(name, value, "only the chosen token's log probability is supported: 0 or 1")
            if value is not False:
                self.add("return_log_probs", True)
        else:
            self.add(name, value, name=_VLLM_NAMES.get(name, ""), from_text=True)

    def _bias_of_words(self, name: str) -> tuple[Any, ...]:
        words, weights = self.values.get(_BIAS_WORDS, ()), self.values.get(_BIAS_WEIGHTS, ())
        entries: tuple[Any, ...] = self.values[name]
        if name == _BIAS_WEIGHTS and len(words) != len(weights):
            return entries
        return tuple(entry for entry, word in zip(entries, words, strict=True) if word)

    def _add_logit_bias(self, value: Any) -> None:
        entries = _from_json("logit_bias", value) if isinstance(value, str) else value
        if not isinstance(entries, dict):
            raise InvalidArgument("logit_bias", value, "must be an object of token ids and numbers")
        option = wire.OPTIONS["embedding_bias_weights"]
        for key, bias in entries.items():
            index = _whole("logit_bias", key, "token ids must be whole numbers", from_text=True)
            (weight,) = check(option, "logit_bias", [bias], from_text=True)
            if self.logit_bias.setdefault(index, weight) != weight:
                raise InvalidArgument("logit_bias", weight, f"was also given as {self.logit_bias[index]!r}")


def check(option: wire.Option, spelling: str, value: Any, *, from_text: bool) -> Any:
    """`value` as the option's Python type (a tuple where it is a list). Raises InvalidArgument or Unsupported."""
    if option.dims != wire.SCALAR:
        return _check_list(option, spelling, value, from_text=from_text)
    checked = _check_one(option, spelling, value, from_text=from_text)
    if option.unsupported and checked not in option.neutral:
        raise Unsupported(spelling, checked, f"{option.unsupported} is not supported by this build")
    return checked


def _check_list(option: wire.Option, spelling: str, value: Any, *, from_text: bool) -> tuple[Any, ...]:
    if isinstance(value, str) and from_text:
        value = _from_json(spelling, value) if value.lstrip().startswith("[") else [value]
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        value = [value]
    entries = list(value)
    if len(entries) > wire.MAX_WORDS:
        raise InvalidArgument(spelling, f"{len(entries)} entries", f"at most {wire.MAX_WORDS} entries")
    checked = tuple(_check_one(option, spelling, entry, from_text=from_text) for entry in entries)
    if option.dtype == "STRING":
        if option.name != _BIAS_WORDS:  # whose empty words have weights of their own
            # Clients of TensorRT-LLM send "" for no words, and rows of a batch are padded so to one length.
            checked = tuple(word for word in checked if word)
        for word in checked:
            if len(word) > wire.MAX_WORD_CHARACTERS:
                raise InvalidArgument(
                    spelling, f"{len(word)} characters", f"entries have at most {wire.MAX_WORD_CHARACTERS} characters"
                )
    return checked


def _check_one(option: wire.Option, spelling: str, value: Any, *, from_text: bool) -> Any:
    if option.dtype == "STRING":
        text = as_text(spelling, value)
        if option.choices and text not in option.choices:
            raise InvalidArgument(spelling, text, option.limit)
        return text
    if option.dtype == "BOOL":
        return _flag(option, spelling, value, from_text=from_text)
    number: float
    if option.dtype == "FP32":
        number = _number(option, spelling, value, from_text=from_text)
    else:
        number = _whole(spelling, value, option.limit, from_text=from_text)
    if (option.minimum is not None and number < option.minimum) or (
        option.maximum is not None and number > option.maximum
    ):
        raise InvalidArgument(spelling, number, option.limit)
    return number


def as_text(spelling: str, value: Any) -> str:
    """Text from the UTF-8 bytes of a tensor, or as it is. Raises InvalidArgument for what is neither."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            bad = value[error.start : error.start + 4]
            raise InvalidArgument(spelling, bad, f"must be UTF-8: {error.reason} at byte {error.start}") from None
    if not isinstance(value, str):
        raise InvalidArgument(spelling, value, "must be text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidArgument(spelling, value[error.start], f"must be Unicode: {error.reason}") from None
    return value


def _flag(option: wire.Option, spelling: str, value: Any, *, from_text: bool) -> bool:
    if from_text and value in _TRUE:
        return True
    if from_text and value in _FALSE:
        return False
    if isinstance(value, bool):
        return value
    raise InvalidArgument(spelling, value, option.limit)


def _number(option: wire.Option, spelling: str, value: Any, *, from_text: bool) -> float:
    if isinstance(value, str) and from_text:
        try:
            value = float(value)
        except ValueError:
            raise InvalidArgument(spelling, value, option.limit) from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidArgument(spelling, value, option.limit)
    try:
        number = float(value)
    except OverflowError:
        raise InvalidArgument(spelling, value, option.limit) from None
    if not math.isfinite(number):
        raise InvalidArgument(spelling, value, option.limit)
    return number


def _whole(spelling: str, value: Any, limit: str, *, from_text: bool) -> int:
    if isinstance(value, str) and from_text:
        try:
            value = int(value)
        except ValueError:
            raise InvalidArgument(spelling, value, limit) from None
    if isinstance(value, float) and from_text and value.is_integer():
        value = int(value)  # JSON numbers beyond 63 bits arrive as floats
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument(spelling, value, limit)
    return value


def _from_json(spelling: str, text: str) -> Any:
    """Raises InvalidArgument; also for JSON nested deeper than any option's, which could not even be shown."""
    too_deep = f"is not valid JSON here: it nests more than {_MAX_JSON_DEPTH} levels"
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidArgument(spelling, text, f"is not valid JSON: {error}") from None
    except RecursionError:
        raise InvalidArgument(spelling, text, too_deep) from None
    if _is_deep(value, _MAX_JSON_DEPTH):
        raise InvalidArgument(spelling, text, too_deep)
    return value


def _is_deep(value: Any, levels: int) -> bool:
    """Whether lists and objects nest in `value` over more than so many levels."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return False
    return levels == 0 or any(_is_deep(entry, levels - 1) for entry in value)


def _same(one: Any, other: Any) -> bool:
    """Equal up to the rounding of a 32-bit float, which one of two spellings may have gone through."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)
    return bool(one == other)
