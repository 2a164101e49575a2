"""Every feature that a request or an engine can have, as data: what asks for it, and with what it cannot go.

`test_matrix.py` runs each pair; `table.py` writes docs/features.md from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pageflight.core.tenants import Tenants, TenantShare

Group = Literal["request", "engine", "precision", "not built"]


@dataclass(frozen=True, slots=True)
class Seen:
    """An answer that nothing ends early, for features that depend on it: a stop string has to be met."""

    ids: tuple[int, ...]
    text: str
    lengths: tuple[int, ...]
    """Of the text, after each token."""

    @property
    def late_id(self) -> int:
        """An id that does not come before the eighth token."""
        return next(index for index in self.ids[7:] if index not in self.ids[:7])

    @property
    def late_text(self) -> str:
        """Two characters on both sides of a border between tokens, and not before it."""
        pieces = (self.text[length - 1 : length + 1] for length in self.lengths[7:-1])
        return next(piece for piece in pieces if self.text.find(piece) >= self.lengths[6])

    @property
    def late_ids(self) -> tuple[int, int]:
        """Two ids that follow one another, and did not before."""
        pairs = list(zip(self.ids, self.ids[1:], strict=False))
        return next(pair for pair in pairs[7:] if pair not in pairs[:7])


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """`asks` is what a person writes; the rest is how the test asks.

    `options` are tensors and parameters of a request to `engine`; `when_seen` more of them, from the answer that the
    others give. `settings` are fields of the scheduler's and the cache's configuration, `parameters` those of
    config.pbtxt that concern the front. `scenes` are what else happens
    (see `scenes.py`). `refused` begins the error of a feature that this build lacks; `not_with` names the features that
    this one cannot go with, and how the refusal begins.
    """

    name: str
    group: Group
    asks: str
    options: Mapping[str, Any] = field(default_factory=dict)
    when_seen: Callable[[Seen], Mapping[str, Any]] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    scenes: frozenset[str] = frozenset()
    dtypes: tuple[str, str] = ("", "")  # of weights and cache; empty: a toy model in numpy
    refused: str = ""
    not_with: Mapping[str, str] = field(default_factory=dict)


_SAMPLES = {"temperature": 0.9, "seed": 7}

REQUEST = (
    Feature(name="streaming", group="request", asks="`stream`", options={"streaming": True}),
    Feature(
        name="several answers", group="request", asks="`num_return_sequences`", options={"num_return_sequences": 3}
    ),
    Feature(name="temperature, seed", group="request", asks="`temperature`, `seed`", options=_SAMPLES),
    Feature(name="top-k", group="request", asks="`top_k`", options={"runtime_top_k": 5, "seed": 7}),
    Feature(name="top-p", group="request", asks="`top_p`", options={"runtime_top_p": 0.6, "seed": 7}),
    Feature(name="min-p", group="request", asks="`min_p`", options={"min_p": 0.2, "seed": 7}),
    Feature(
        name="repetition penalty",
        group="request",
        asks="`repetition_penalty`",
        options={"repetition_penalty": 1.8},
    ),
    Feature(
        name="presence, frequency penalty",
        group="request",
        asks="`presence_penalty`, `frequency_penalty`",
        options={"presence_penalty": 2.0, "frequency_penalty": 1.5},
    ),
    Feature(
        name="logit bias",
        group="request",
        asks="`logit_bias`, `embedding_bias_words`, `embedding_bias`",
        when_seen=lambda seen: {"logit_bias": {seen.ids[2]: -50.0, seen.ids[0]: 1.5}},
    ),
    Feature(
        name="bad words",
        group="request",
        asks="`bad_words`, `bad_words_list`",
        when_seen=lambda seen: {"bad_words_list": [seen.ids[3:4], seen.ids[4:6]]},
    ),
    Feature(
        name="stop strings",
        group="request",
        asks="`stop_words`",
        when_seen=lambda seen: {"stop_words": [seen.late_text]},
    ),
    Feature(
        name="stop ids",
        group="request",
        asks="`stop_token_ids`, `stop_words_list`",
        when_seen=lambda seen: {"stop_token_ids": [seen.late_id], "stop_words_list": [seen.late_ids]},
    ),
    Feature(
        name="another end",
        group="request",
        asks="`end_id`",
        when_seen=lambda seen: {"end_id": seen.late_id},
        not_with={"no end": "ignore_eos="},
    ),
    Feature(name="no end", group="request", asks="`ignore_eos`", options={"ignore_eos": True}),
    Feature(name="least length", group="request", asks="`min_tokens`", options={"min_tokens": 13}),
    Feature(
        name="prompt in the answer",
        group="request",
        asks="`exclude_input_in_output` false",
        options={"exclude_input_in_output": False},
        not_with={"streaming": "exclude_input_in_output="},
    ),
    Feature(
        name="special tokens shown",
        group="request",
        asks="`skip_special_tokens` false",
        options={"skip_special_tokens": False},
    ),
    Feature(name="log probabilities", group="request", asks="`return_log_probs`", options={"return_log_probs": True}),
    Feature(
        name="times and cache use", group="request", asks="`return_perf_metrics`", options={"return_perf_metrics": True}
    ),
    Feature(name="priority", group="request", asks="`priority`", options={"priority": 3}),
    Feature(name="deadline", group="request", asks="`timeout_ms`", scenes=frozenset({"deadline"})),
    Feature(
        name="cancellation",
        group="request",
        asks="closing the connection, `stop`",
        scenes=frozenset({"cancel"}),
    ),
    Feature(name="tenant", group="request", asks="`tenant`", options={"tenant": "shop"}),
    Feature(name="cache salt", group="request", asks="`cache_salt`", options={"cache_salt": "mine"}),
    Feature(
        name="retention priority",
        group="request",
        asks="`kv_retention_priority`",
        options={"kv_retention_priority": 80},
    ),
)

ENGINE = (
    Feature(
        name="prefix cache",
        group="engine",
        asks="`--prefix-cache`",
        settings={"prefix_cache": True},
        scenes=frozenset({"warm"}),
    ),
    Feature(
        name="one prefill for a shared prefix",
        group="engine",
        asks="`--prefix-cache`, at the same time",
        settings={"prefix_cache": True},
        scenes=frozenset({"twin"}),
    ),
    Feature(name="chunked prefill", group="engine", asks="`--max-num-tokens`", settings={"max_num_tokens": 8}),
    Feature(
        name="preemption",
        group="engine",
        asks="more requests than the cache holds",
        settings={"num_tokens": 80},
        scenes=frozenset({"crowd"}),
    ),
    Feature(
        name="host memory as second level",
        group="engine",
        asks="`--host-kv-memory`, more requests than the cache holds",
        settings={"num_tokens": 80, "num_host_tokens": 640},
        scenes=frozenset({"crowd"}),
    ),
    Feature(
        name="optimistic admission",
        group="engine",
        asks="`--kv-admission optimistic`",
        settings={"kv_admission": "optimistic"},
    ),
    Feature(
        name="full-length reservation",
        group="engine",
        asks="`--kv-admission reserve`",
        settings={"kv_admission": "reserve"},
    ),
    Feature(
        name="policy fair",
        group="engine",
        asks="`--scheduling-policy fair`",
        settings={"scheduling_policy": "fair"},
    ),
    Feature(
        name="policy fcfs",
        group="engine",
        asks="`--scheduling-policy fcfs`",
        settings={"scheduling_policy": "fcfs"},
    ),
    Feature(
        name="quotas of tenants",
        group="engine",
        asks="`--tenants`",
        settings={"tenants": Tenants(default=TenantShare(max_running=2, kv_share=0.9))},
    ),
    Feature(
        name="bounded inter-token time",
        group="engine",
        asks="`--target-inter-token-ms`",
        settings={"target_inter_token_ms": 5.0},
    ),
    Feature(
        name="results independent of company",
        group="engine",
        asks="`--deterministic`",
        settings={"deterministic": True},
    ),
    Feature(
        name="budget of responses",
        group="engine",
        asks="`--response-rate`",
        parameters={"response_rate": "100"},
    ),
    Feature(
        name="replay after the core's death",
        group="engine",
        asks="`kill -9`, an engine that fails",
        scenes=frozenset({"death"}),
    ),
    Feature(
        name="recording, invariants checked",
        group="engine",
        asks="`--record`, `--check-invariants`",
        scenes=frozenset({"record"}),
    ),
)

PRECISION = (
    Feature(name="bf16", group="precision", asks="`--dtype bf16`", dtypes=("bf16", "default")),
    Feature(name="int8", group="precision", asks="`--dtype int8`", dtypes=("int8", "default")),
    Feature(name="u8 cache", group="precision", asks="`--kv-dtype u8`", dtypes=("fp32", "u8")),
)

NOT_BUILT = (
    Feature(
        name="beam search", group="not built", asks="`beam_width`", options={"beam_width": 2}, refused="beam_width=2"
    ),
    Feature(
        name="guided decoding",
        group="not built",
        asks="`guided_decoding_guide`",
        options={"guided_decoding_guide_type": "json", "guided_decoding_guide": "{}"},
        refused="guided_decoding_guide_type='json'",
    ),
    Feature(
        name="LoRA", group="not built", asks="`lora_task_id`", options={"lora_task_id": 1}, refused="lora_task_id=1"
    ),
    Feature(
        name="logits in the answer",
        group="not built",
        asks="`return_generation_logits`, `return_context_logits`",
        options={"return_generation_logits": True},
        refused="return_generation_logits=True",
    ),
)

FEATURES: tuple[Feature, ...] = (*REQUEST, *ENGINE, *PRECISION, *NOT_BUILT)


def refusal(one: Feature, other: Feature) -> str:
    """How the error begins that a request with both gets; empty where they go together."""
    return one.not_with.get(other.name) or other.not_with.get(one.name) or one.refused or other.refused


def is_same_choice(one: Feature, other: Feature) -> bool:
    """Two values of one setting are no pair."""
    return bool(one.settings.keys() & other.settings.keys() or (one.dtypes[0] and other.dtypes[0])) and (
        one.settings != other.settings or bool(one.dtypes[0])
    )
