"""What no engine can be faster than: bytes by the bandwidth of the memory, operations by the rate of the card.

A step of decoding reads every weight but the embedding once, and all K/V of its sequences; a token takes two operations
per parameter that multiplies it, and four per query feature and token of its context. Ranks and stages are taken to
tell each other what they must in no time: with several cards a ceiling is further away than with one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pageflight_build.plan.cards import Card
from pageflight_build.plan.demand import BLOCK_SIZE, Demand
from pageflight_build.plan.shares import Share


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Tokens a second of one sequence alone, of all together, and of prompts. None where the card's speed is unknown.

    `decode_bound` and `prefill_bound` say what holds: memory or compute.
    """

    decode_alone_tokens_s: float | None = None
    decode_tokens_s: float | None = None
    decode_bound: str | None = None
    prefill_tokens_s: float | None = None
    prefill_bound: str | None = None


def rate_of(card: Card, dtype: str) -> float | None:
    """Operations a second of matrix products. Integer weights are widened to bf16; of fp32 no rate is published."""
    return {"fp8": card.fp8_flops_s, "fp32": None}.get(dtype, card.bf16_flops_s)


def ceilings_of(card: Card, shares: Sequence[Share], demand: Demand) -> Ceilings:
    """`shares`: of the stages, in order."""
    if card.bandwidth_bytes_s is None:
        return Ceilings()
    alone, _ = _decode(card, shares, demand, 1)
    together, bound = _decode(card, shares, demand, demand.concurrency)
    found = Ceilings(decode_alone_tokens_s=alone, decode_tokens_s=together, decode_bound=bound)
    rate = rate_of(card, demand.dtype)
    if rate is None:
        return found
    times = [_prefill_times(card.bandwidth_bytes_s, rate, share, demand) for share in shares]
    memory_s, compute_s = max(times, key=max)
    return Ceilings(
        decode_alone_tokens_s=alone,
        decode_tokens_s=together,
        decode_bound=bound,
        prefill_tokens_s=demand.max_num_tokens / max(memory_s, compute_s),
        prefill_bound="memory" if memory_s >= compute_s else "compute",
    )


def _decode(card: Card, shares: Sequence[Share], demand: Demand, num_sequences: int) -> tuple[float, str]:
    """Tokens a second, and what bounds the slowest stage. Stages work on parts of the batch, one after the other."""
    num_parts = min(len(shares), num_sequences)
    times = [_decode_times(card, share, demand, num_sequences / num_parts) for share in shares]
    longest = max(times, key=max)
    round_s = max(sum(max(time) for time in times), num_parts * max(longest))
    return num_sequences / round_s, "memory" if longest[0] >= longest[1] else "compute"


def _decode_times(card: Card, share: Share, demand: Demand, num_sequences: float) -> tuple[float, float]:
    """Seconds of a stage's step by memory and by compute."""
    assert card.bandwidth_bytes_s is not None
    kv_bytes = num_sequences * demand.context * share.block_bytes / BLOCK_SIZE
    per_token = 2 * (share.num_matrix_parameters + share.num_head_parameters)
    per_token += 4 * share.num_attention_features * demand.context
    rate = rate_of(card, demand.dtype)
    compute_s = num_sequences * per_token / rate if rate else 0.0
    return (share.read_bytes + kv_bytes) / card.bandwidth_bytes_s, compute_s


def _prefill_times(bandwidth: float, rate: float, share: Share, demand: Demand) -> tuple[float, float]:
    """The same of a step full of prompt tokens, which see half of the context on average."""
    per_token = 2 * share.num_matrix_parameters + 2 * share.num_attention_features * demand.context
    return share.read_bytes / bandwidth, demand.max_num_tokens * per_token / rate
