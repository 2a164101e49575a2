"""What was asked: frozen, validated once at the border."""

from __future__ import annotations

from dataclasses import dataclass

MAX_PRIORITY = 100
DEFAULT_PRIORITY = 35
"""Of K/V blocks kept without a wish; the scale and this value are TensorRT-LLM's (`KvCacheRetentionConfig`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. Text-level wishes (stop strings) stay in the front; these are about ids.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0 and penalties at their neutral value are off.
    `repetition_penalty` divides positive and multiplies negative logits of tokens seen in prompt or output
    (Keskar et al., CTRL, 2019); presence and frequency penalties count output tokens only, as OpenAI's do.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    n: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the sequence (end of sequence among them unless it is ignored). Suppressed until `min_tokens`."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Token sequences that must not appear: the last id of one is masked where the others precede it."""
    log_probs: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request as the scheduler sees it: ids in, `sampling.n` sequences out.

    `handle` is unique in the core; the request's sequences have handles `handle … handle + n - 1`.
    Times are seconds of the monotonic clock (CLOCK_MONOTONIC: comparable across processes of one machine).
    `output_ids` is not empty when a restarted core takes the sequence over: tokens already delivered.
    """

    handle: int
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    arrival_s: float = 0.0
    deadline_s: float | None = None
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    sequence_index: int = 0
    """Index of the first sequence within what the client asked: not 0 when one sequence of several is replayed."""
    output_ids: tuple[int, ...] = ()
    trial_tokens: int = 0
    """Cores died in steps of this sequence: until it has so many more tokens, its steps have nobody else in them."""
    is_taken_over: bool = False
    """Accepted by a core that is no more: limits of the queue do not refuse it."""
    kv_retention_priority: int | None = None
    """0 to 100: K/V blocks of a lower one are evicted first. None leaves found blocks as they are; new ones get 35."""
