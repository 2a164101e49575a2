"""Every tensor and option that travels between clients and the Triton models: names, types, shapes, limits, meaning.

The one source for the generated `config.pbtxt`, for validation and for the documentation. An *option* is a wish of the
client under its canonical name; a *tensor* is how one of the models spells it. Models that take text spell options by
their canonical names; `engine` keeps TensorRT-LLM's spellings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pageflight.core.request import MAX_PRIORITY

DType = Literal["STRING", "BOOL", "INT32", "INT64", "UINT64", "FP32"]

SCALAR = (1,)
LIST = (-1,)

INT32_MAX = 2**31 - 1
MAX_WORDS = 1000
"""Entries of a list of words (`stop_words`, `bad_words`, `embedding_bias_words`)."""
MAX_WORD_CHARACTERS = 1000
MAX_SEQUENCES = 64
"""Of `num_return_sequences`."""
END_REQUESTS_OF = "pageflight_end_requests_of"
"""Request parameter of `preprocessing`, with the secret of a dead stub: what it had open ends with an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A wish of the client. Numbers must be finite and within `minimum` … `maximum` (inclusive; None: no limit).

    `unsupported` names the missing feature: then only the `neutral` values, which ask for nothing, are accepted.
    """

    name: str
    dtype: DType
    dims: tuple[int, ...] = SCALAR
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    unsupported: str = ""
    neutral: tuple[object, ...] = ()
    meaning: str

    @property
    def limit(self) -> str:
        """The range in words, for error messages and documentation."""
        if self.choices:
            return f"must be one of {', '.join(self.choices)}"
        if self.dtype == "BOOL":
            return "must be true or false"
        if self.dtype == "STRING":
            return f"must be text, at most {MAX_WORDS} entries" if self.dims != SCALAR else "must be text"
        kind = "a finite number" if self.dtype == "FP32" else "a whole number"
        if self.minimum is not None and self.maximum is not None:
            return f"must be {kind} from {self.minimum:g} to {self.maximum:.10g}"
        if self.minimum is not None:
            return f"must be {kind}, at least {self.minimum:g}"
        return f"must be {kind}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One input or output of a Triton model. `option` is the canonical name of what it carries, where it is one."""

    name: str
    dtype: DType
    dims: tuple[int, ...] = SCALAR
    optional: bool = False
    option: str = ""
    meaning: str = ""


def _count(name: str, minimum: int, meaning: str, maximum: int = INT32_MAX) -> Option:
    return Option(name=name, dtype="INT32", minimum=minimum, maximum=maximum, meaning=meaning)


def _number(name: str, minimum: float, maximum: float, meaning: str) -> Option:
    return Option(name=name, dtype="FP32", minimum=minimum, maximum=maximum, meaning=meaning)


def _flag(name: str, meaning: str) -> Option:
    return Option(name=name, dtype="BOOL", meaning=meaning)


def _words(name: str, meaning: str) -> Option:
    return Option(name=name, dtype="STRING", dims=LIST, meaning=meaning)


_GUIDED = "guided decoding"
_LORA = "LoRA adapters"

_OPTIONS = (
    _count("max_tokens", 1, "most output tokens; default from the build"),
    _count("min_tokens", 0, "output tokens before which nothing ends the sequence"),
    _count("num_return_sequences", 1, "independent answers to one prompt", MAX_SEQUENCES),
    Option(
        name="beam_width",
        dtype="INT32",
        unsupported="beam search",
        neutral=(1,),
        meaning="beams; only 1, which is no beam search",
    ),
    _count("top_k", -1, "sample from the k likeliest tokens; 1 is greedy, 0 and -1 are off"),
    _count("end_id", -1, "token that ends a sequence instead of the model's own; -1: none does"),
    _count("pad_id", -1, "fills the shorter rows of `output_ids` when several sequences come in one response"),
    _number("temperature", 0.0, 100.0, "0 is greedy; divides the logits otherwise"),
    _number("top_p", 0.0, 1.0, "sample from the likeliest tokens that together have this probability; 1 is off"),
    _number("min_p", 0.0, 1.0, "drop tokens less likely than this fraction of the likeliest; 0 is off"),
    _number("repetition_penalty", 0.01, 100.0, "divides the logits of tokens seen before; 1 is off"),
    _number("presence_penalty", -100.0, 100.0, "subtracted once from tokens of the output; 0 is off"),
    _number("frequency_penalty", -100.0, 100.0, "subtracted per occurrence from tokens of the output; 0 is off"),
    Option(
        name="length_penalty",
        dtype="FP32",
        unsupported="beam search, which alone has a length penalty",
        neutral=(0.0, 1.0),
        meaning="of beam search",
    ),
    Option(
        name="seed",
        dtype="UINT64",
        minimum=0,
        maximum=2**64 - 1,
        meaning="of the random numbers; with the position it determines them, whatever else is in the batch",
    ),
    _words("stop_words", "the text ends before the first of these"),
    _words("bad_words", "must not appear, as they are tokenized alone and after a space"),
    Option(
        name="stop_token_ids",
        dtype="INT32",
        dims=LIST,
        minimum=0,
        maximum=INT32_MAX,
        meaning="further tokens that end a sequence",
    ),
    _flag("stream", "one response per step instead of one at the end"),
    _flag("exclude_input_in_output", "false: the answer starts with the prompt (not while streaming)"),
    _flag("skip_special_tokens", "false: special tokens appear in the text"),
    _flag("return_log_probs", "send the log probabilities of the output tokens and their sum"),
    Option(
        name="return_context_logits",
        dtype="BOOL",
        unsupported="logits of the prompt",
        neutral=(False,),
        meaning="send the logits of the prompt",
    ),
    Option(
        name="return_generation_logits",
        dtype="BOOL",
        unsupported="logits of the output",
        neutral=(False,),
        meaning="send the logits of the output",
    ),
    _flag("return_perf_metrics", "send times and cache use with the last response"),
    _flag("return_num_input_tokens", "send the prompt's length with the last response"),
    _flag("return_num_output_tokens", "send the answer's length with the last response"),
    _flag("return_finish_reason", "send why the answer ended with the last response"),
    _flag("ignore_eos", "the model's end-of-sequence token does not end the answer"),
    _words("embedding_bias_words", "words whose tokens' logits are shifted"),
    Option(
        name="embedding_bias_weights",
        dtype="FP32",
        dims=LIST,
        minimum=-1e6,
        maximum=1e6,
        meaning="the shift of each of `embedding_bias_words`",
    ),
    Option(
        name="guided_decoding_guide_type",
        dtype="STRING",
        choices=("json", "json_schema", "regex", "ebnf_grammar", "choice"),
        unsupported=_GUIDED,
        meaning="what `guided_decoding_guide` is",
    ),
    Option(name="guided_decoding_guide", dtype="STRING", unsupported=_GUIDED, meaning="what the answer must match"),
    Option(name="lora_name", dtype="STRING", unsupported=_LORA, meaning="the adapter to use"),
    Option(name="lora_task_id", dtype="UINT64", unsupported=_LORA, meaning="the adapter to use, by number"),
    _count("priority", -INT32_MAX, "higher is scheduled earlier"),
    _count("timeout_ms", 1, "deadline from arrival; then the request ends with CANCELLED"),
    Option(name="tenant", dtype="STRING", meaning="whom the request belongs to"),
    Option(name="cache_salt", dtype="STRING", meaning="requests share cached prefixes only with the same salt"),
    _count("kv_retention_priority", 0, "K/V blocks of a higher one stay cached longer; 35 without it", MAX_PRIORITY),
    Option(
        name="sampling_parameters", dtype="STRING", meaning="vllm_backend's JSON object; numbers may arrive as strings"
    ),
)

OPTIONS: dict[str, Option] = {option.name: option for option in _OPTIONS}

ALIASES: dict[str, str] = {
    "min_length": "min_tokens",
    "runtime_top_k": "top_k",
    "runtime_top_p": "top_p",
    "len_penalty": "length_penalty",
    "random_seed": "seed",
    "streaming": "stream",
    "request_output_len": "max_tokens",
}
"""Other spellings of options, accepted wherever options are named."""

_TEXT_ONLY_PARAMETERS = ("stop_token_ids", "skip_special_tokens")


def _option_tensor(name: str) -> Tensor:
    option = OPTIONS[ALIASES.get(name, name)]
    return Tensor(
        name=name,
        dtype=option.dtype,
        dims=option.dims,
        optional=True,
        option=option.name,
        meaning=option.meaning if name == option.name else f"another name of `{option.name}`",
    )


_TEXT_OPTION_NAMES = tuple(name for option in _OPTIONS if (name := option.name) not in _TEXT_ONLY_PARAMETERS)

TEXT_INPUTS: tuple[Tensor, ...] = (
    Tensor(name="text_input", dtype="STRING", meaning="the prompt"),
    *(_option_tensor(name) for name in _TEXT_OPTION_NAMES),
    _option_tensor("min_length"),
)
"""Inputs of the model named after the checkpoint. `text_input` is required, everything else optional."""

ENSEMBLE_INPUTS: tuple[Tensor, ...] = TEXT_INPUTS

_ENGINE_SPELLING = {
    "max_tokens": "request_output_len",
    "top_k": "runtime_top_k",
    "top_p": "runtime_top_p",
    "length_penalty": "len_penalty",
    "stream": "streaming",
}

ENGINE_INPUTS: tuple[Tensor, ...] = (
    Tensor(
        name="input_ids",
        dtype="INT32",
        dims=LIST,
        optional=True,
        meaning="the prompt's token ids; required unless `stop` is set",
    ),
    Tensor(
        name="input_lengths", dtype="INT32", optional=True, meaning="how many of `input_ids` count; default all of them"
    ),
    *(_option_tensor(_ENGINE_SPELLING.get(name, name)) for name in _TEXT_OPTION_NAMES),
    _option_tensor("min_length"),
    _option_tensor("random_seed"),
    Tensor(
        name="stop_words_list",
        dtype="INT32",
        dims=(2, -1),
        optional=True,
        meaning="token sequences that end the answer: row 0 ids, row 1 cumulative ends, padded with -1",
    ),
    Tensor(
        name="bad_words_list",
        dtype="INT32",
        dims=(2, -1),
        optional=True,
        meaning="token sequences that must not appear, encoded like `stop_words_list`",
    ),
    Tensor(
        name="embedding_bias",
        dtype="FP32",
        dims=LIST,
        optional=True,
        meaning="added to the logits: one number per token of the vocabulary",
    ),
    Tensor(name="stop", dtype="BOOL", optional=True, meaning="cancel the open request that has this request's id"),
)

TEXT_OUTPUTS: tuple[Tensor, ...] = (
    Tensor(name="text_output", dtype="STRING", dims=LIST, meaning="the new text, one entry per sequence"),
    Tensor(name="finish_reason", dtype="STRING", dims=LIST, meaning="stop, length, cancelled, deadline or error"),
    Tensor(name="num_input_tokens", dtype="INT32", dims=SCALAR, meaning="tokens of the prompt"),
    Tensor(name="num_output_tokens", dtype="INT32", dims=LIST, meaning="tokens of each answer"),
    Tensor(name="cum_log_probs", dtype="FP32", dims=LIST, meaning="sum of each answer's log probabilities"),
    Tensor(name="output_log_probs", dtype="FP32", dims=(-1, -1), meaning="log probabilities of the new tokens"),
    Tensor(name="sequence_index", dtype="INT32", meaning="which of several sequences a streamed response belongs to"),
    Tensor(name="batch_index", dtype="INT32", meaning="which row of a batched request the response belongs to"),
    Tensor(name="kv_cache_reused_blocks", dtype="INT32", meaning="blocks found in the prefix cache"),
    Tensor(name="kv_cache_alloc_new_blocks", dtype="INT32", meaning="blocks filled anew"),
    Tensor(name="kv_cache_alloc_total_blocks", dtype="INT32", meaning="both together"),
    Tensor(name="total_draft_tokens", dtype="INT32", meaning="proposed by speculation: 0 without it"),
    Tensor(name="total_accepted_draft_tokens", dtype="INT32", meaning="of them accepted: 0 without speculation"),
    Tensor(name="acceptance_rate", dtype="FP32", meaning="accepted per proposed token: 0 without speculation"),
    Tensor(name="arrival_time_ns", dtype="INT64", meaning="nanoseconds of the Unix epoch"),
    Tensor(name="first_scheduled_time_ns", dtype="INT64", meaning="nanoseconds of the Unix epoch"),
    Tensor(name="first_token_time_ns", dtype="INT64", meaning="nanoseconds of the Unix epoch"),
    Tensor(name="last_token_time_ns", dtype="INT64", meaning="nanoseconds of the Unix epoch"),
)
"""Outputs of the text models. Logits are not among them: asking for them is refused."""

ENGINE_OUTPUTS: tuple[Tensor, ...] = (
    Tensor(name="output_ids", dtype="INT32", dims=(-1, -1), meaning="the new tokens, one row per sequence"),
    Tensor(name="sequence_length", dtype="INT32", dims=LIST, meaning="valid entries of each row of `output_ids`"),
    *TEXT_OUTPUTS,
)

PREPROCESSING_INPUTS: tuple[Tensor, ...] = (
    Tensor(name="QUERY", dtype="STRING", meaning="the prompt"),
    Tensor(name="REQUEST_OUTPUT_LEN", dtype="INT32", optional=True, option="max_tokens", meaning="passed through"),
    Tensor(name="BAD_WORDS_DICT", dtype="STRING", dims=LIST, optional=True, option="bad_words"),
    Tensor(name="STOP_WORDS_DICT", dtype="STRING", dims=LIST, optional=True, option="stop_words"),
    Tensor(name="EMBEDDING_BIAS_WORDS", dtype="STRING", dims=LIST, optional=True, option="embedding_bias_words"),
    Tensor(name="EMBEDDING_BIAS_WEIGHTS", dtype="FP32", dims=LIST, optional=True, option="embedding_bias_weights"),
    Tensor(name="END_ID", dtype="INT32", optional=True, option="end_id", meaning="default: the model's own"),
    Tensor(name="PAD_ID", dtype="INT32", optional=True, option="pad_id", meaning="default: the model's own"),
)

PREPROCESSING_OUTPUTS: tuple[Tensor, ...] = (
    Tensor(name="INPUT_ID", dtype="INT32", dims=LIST, meaning="token ids of QUERY, padded with PAD_ID in a batch"),
    Tensor(name="REQUEST_INPUT_LEN", dtype="INT32", meaning="valid entries of INPUT_ID"),
    Tensor(name="REQUEST_OUTPUT_LEN", dtype="INT32", meaning="as given; only where it was given"),
    Tensor(name="BAD_WORDS_IDS", dtype="INT32", dims=(2, -1), meaning="for `bad_words_list`; only where asked for"),
    Tensor(name="STOP_WORDS_IDS", dtype="INT32", dims=(2, -1), meaning="for `stop_words_list`; only where asked for"),
    Tensor(name="EMBEDDING_BIAS", dtype="FP32", dims=LIST, meaning="for `embedding_bias`; only where asked for"),
    Tensor(name="OUT_END_ID", dtype="INT32"),
    Tensor(name="OUT_PAD_ID", dtype="INT32"),
)

POSTPROCESSING_INPUTS: tuple[Tensor, ...] = (
    Tensor(name="TOKENS_BATCH", dtype="INT32", dims=(-1, -1), meaning="`output_ids` of the engine"),
    Tensor(name="SEQUENCE_LENGTH", dtype="INT32", dims=LIST, meaning="`sequence_length` of the engine"),
)

POSTPROCESSING_OUTPUTS: tuple[Tensor, ...] = (
    Tensor(name="OUTPUT", dtype="STRING", dims=LIST, meaning="text of each row"),
)

ENSEMBLE_TO_ENGINE: dict[str, str] = {
    tensor.name: _ENGINE_SPELLING.get(tensor.name, tensor.name) for tensor in ENSEMBLE_INPUTS if tensor.option
}
"""How the ensemble's inputs, `text_input` aside, are spelt by `engine`."""

RETURN_OPTIONS: dict[str, tuple[str, ...]] = {
    "return_finish_reason": ("finish_reason",),
    "return_num_input_tokens": ("num_input_tokens",),
    "return_num_output_tokens": ("num_output_tokens",),
    "return_log_probs": ("cum_log_probs", "output_log_probs"),
    "return_perf_metrics": (
        "kv_cache_reused_blocks",
        "kv_cache_alloc_new_blocks",
        "kv_cache_alloc_total_blocks",
        "total_draft_tokens",
        "total_accepted_draft_tokens",
        "acceptance_rate",
        "arrival_time_ns",
        "first_scheduled_time_ns",
        "first_token_time_ns",
        "last_token_time_ns",
    ),
}
"""Which outputs each `return_…` option asks for. Clients of `NAME` and `engine` may also ask by naming the outputs in
their request. Triton does not tell the steps of an ensemble what its client named: with the last response of `ensemble`
come `finish_reason` and the two counts, unless the client named others only, and the rest on its `return_…` option."""
