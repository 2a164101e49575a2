"""A plan as JSON: keys stay, units are in their names."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pageflight_build.plan.demand import BLOCK_SIZE
from pageflight_build.plan.fit import Fit
from pageflight_build.plan.planner import Plan
from pageflight_build.plan.rule import SizePlan
from pageflight_build.plan.words import build_command, sentences, size_sentences


def as_json(plan: Plan) -> dict[str, Any]:
    """`given` is null where no cards were named; `fewest` has one entry per kind of card that can hold it."""
    config = plan.config
    return {
        "model": {
            "family": config.family,
            "num_parameters": config.num_parameters,
            "num_layers": config.num_layers,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "vocab_size": config.vocab_size,
            "max_positions": config.max_positions,
            "checkpoint_bytes": plan.checkpoint_bytes or None,
        },
        "demand": asdict(plan.demand),
        "weight_bytes": plan.weight_bytes,
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "kv_block_tokens": BLOCK_SIZE,
        "kv_bytes": plan.kv_bytes,
        "published_rule_bytes": round(plan.rule_bytes),
        "holds": plan.holds,
        "given": None if plan.given is None else fit_json(plan.given),
        "fewest": [fit_json(one) for one in plan.fits],
        "instead": {dtype: fit_json(one) for dtype, one in plan.instead.items()},
        "build_command": None if plan.given is None else build_command(plan.demand, plan.given),
        "sentences": sentences(plan),
    }


def fit_json(fit: Fit) -> dict[str, Any]:
    """One fit; bytes are of the card that has least left."""
    return {
        "num_cards": fit.layout.num_cards,
        "holds": fit.holds,
        "cache_tokens": fit.cache_tokens,
        **asdict(fit),
    }


def size_json(plan: SizePlan) -> dict[str, Any]:
    """A plan without shapes."""
    return {
        "num_parameters": plan.num_parameters,
        "dtype": plan.dtype,
        "gpu_memory_utilization": plan.gpu_memory_utilization,
        "weight_bytes": plan.weight_bytes,
        "published_rule_bytes": round(plan.rule_bytes),
        "holds": plan.holds,
        "given": None if plan.given is None else asdict(plan.given),
        "fewest": [asdict(one) for one in plan.fits],
        "sentences": size_sentences(plan),
    }
