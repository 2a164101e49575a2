"""Does the engine compute what the checkpoint says? Asked after every build, before anything is put in place.

Two questions. The same tokens, once as one prompt and once as two chunks and a decode step in other blocks, must give
the same logits (what goes wrong there: positions, block tables, K/V writes). And the logits must be those of the numpy
reference (what goes wrong there: weight order, scales, rotary constants); skipped for models too large to wait for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pageflight.core.errors import CheckpointError
from pageflight.lowering.base import CompiledModel, StepInputs

REFERENCE_MAX_PARAMETERS = 1_500_000_000
NUM_TOKENS = 45  # crosses a border of blocks of 16 and 32

# Relative RMS error of logits that rounding alone explains; a wrong layout or scale gives 0.5 and more, mostly 1.4.
_ROUNDING = {"fp32": 1e-3, "fp16": 0.01, "bf16": 0.06, "int8": 0.12, "fp8": 0.4, "int4": 0.8}
_KV_ROUNDING = {"fp32": 0.0, "fp16": 0.003, "bf16": 0.02, "fp8": 0.15, "u8": 0.06}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """Relative RMS errors of logits. `reference_error` is None where the model was too large to compare."""

    num_tokens: int
    chunk_error: float
    reference_error: float | None
    limit: float


def verification_ids(vocab_size: int, max_model_len: int) -> list[int]:
    """Tokens to try: any will do, the same ones at every build."""
    count = min(NUM_TOKENS, max_model_len)
    return [int(i) for i in np.random.default_rng(20).integers(0, vocab_size, count)]


def verify(
    model: CompiledModel,
    ids: Sequence[int],
    *,
    dtype: str,
    kv_dtype: str,
    reference: NDArray[np.float32] | None,
) -> Verified:
    """Run `ids` through `model` both ways and compare. Allocates the model's blocks.

    Raises CheckpointError when logits are not finite or differ by more than rounding to `dtype` explains.
    """
    size = model.block_size
    per_sequence = -(-len(ids) // size)
    model.allocate(2 * per_sequence + 1)
    whole = _run(model, ids, 0, list(range(1, per_sequence + 1)))
    others = list(range(2 * per_sequence, per_sequence, -1))  # downwards: a table that is ignored would show
    borders = sorted({0, len(ids) // 3, len(ids) - 1, len(ids)})
    pieces = [_run(model, ids[a:b], a, others) for a, b in itertools.pairwise(borders)]
    chunked = np.concatenate(pieces)
    if not np.isfinite(whole).all():
        count = int(np.count_nonzero(~np.isfinite(whole)))
        raise CheckpointError(
            f"the built engine gives {count} logits that are NaN or infinite; the weights may overflow {dtype}:"
            " build with --dtype fp32"
        )
    limit = _ROUNDING[dtype] + _KV_ROUNDING[kv_dtype]
    chunk_error = _relative_error(chunked, whole)
    if chunk_error > limit:
        raise CheckpointError(
            f"the built engine contradicts itself: a prompt in chunks gives other logits than in one piece (relative"
            f" error {chunk_error:.3g}, limit {limit:.3g}); this is a fault of the engine, not of the checkpoint"
        )
    reference_error = None
    if reference is not None:
        reference_error = _relative_error(whole, reference)
        if reference_error > limit:
            raise CheckpointError(
                f"the built engine's logits are not the checkpoint's (relative error {reference_error:.3g}, limit"
                f" {limit:.3g} for {dtype}); build with --dtype fp32 to see whether precision is the cause"
            )
    return Verified(num_tokens=len(ids), chunk_error=chunk_error, reference_error=reference_error, limit=limit)


def _relative_error(values: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """RMS of the difference ÷ RMS of the expected logits around their mean."""
    spread = float(np.sqrt(np.mean(np.square(expected - expected.mean(axis=-1, keepdims=True), dtype=np.float64))))
    difference = float(np.sqrt(np.mean(np.square(values - expected, dtype=np.float64))))
    return difference / max(spread, 1e-12)


def _run(model: CompiledModel, ids: Sequence[int], past: int, blocks: Sequence[int]) -> NDArray[np.float32]:
    """Logits of `ids`, which follow `past` tokens of the same sequence."""
    count = len(ids)
    used = -(-(past + count) // model.block_size)
    model.start(
        StepInputs(
            ids_T=np.asarray(ids, np.int64),
            positions_T=np.arange(past, past + count, dtype=np.int64),
            past_lens_S=np.array([past], np.int32),
            token_begins=np.array([0, count], np.int32),
            block_indices_N=np.asarray(blocks[:used], np.int32),
            block_begins=np.array([0, used], np.int32),
            max_context_len=past + count,
            take_L=np.arange(count, dtype=np.int64),
        )
    )
    return np.array(model.wait(), np.float32)
