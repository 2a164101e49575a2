"""What every kernel of sampling asks of a row: its parameters, scores, weights, peak, and its random number.

L lines of logits, R rows of the batch (line l belongs to row rows_L[l]; -1: to none), V vocabulary, C chunks of
`CHUNK` ids of one line.

A weight is exp((score - peak) / temperature), at most 1, held as a whole number of 2^-44. So sums of weights are exact,
whatever the order they are added in: the same logits give the same id in any line, batch or division of work. (A
float32 has no more than 2^-25 to tell apart near 1; 2^18 weights fit into 62 bits.)
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: SIM102

from __future__ import annotations

import triton
import triton.language as tl

# columns of a row's parameters
TEMPERATURE, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY = (tl.constexpr(column) for column in range(6))
TOP_K, SEED, SEQUENCE_INDEX, LISTS, COUNTS = (tl.constexpr(column) for column in range(5))
NUM_FLOATS, NUM_INTEGERS = tl.constexpr(6), tl.constexpr(5)

CHUNK = tl.constexpr(4096)
LARGEST = tl.constexpr(3.4028234663852886e38)  # the greatest float32
INFINITY = tl.constexpr(float("inf"))
ONE = tl.constexpr(17592186044416.0)  # 2^44: the weight of the likeliest id
NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def temperature_of(floats, row):
    return tl.load(floats + row * NUM_FLOATS + TEMPERATURE).to(tl.float32)


@triton.jit
def is_greedy(floats, integers, row):
    return (temperature_of(floats, row) <= 0) | (tl.load(integers + row * NUM_INTEGERS + TOP_K) == 1)


@triton.jit
def is_filtered(floats, integers, row, vocab):
    """Whether less than the whole vocabulary may be drawn."""
    top_k = tl.load(integers + row * NUM_INTEGERS + TOP_K)
    top_p = tl.load(floats + row * NUM_FLOATS + TOP_P)
    min_p = tl.load(floats + row * NUM_FLOATS + MIN_P)
    return ((top_k > 0) & (top_k < vocab)) | (top_p < 1.0) | (min_p > 0.0)


@triton.jit
def is_adjusted(integers, row):
    """Whether the row's scores differ from its logits: it has lists or counts."""
    address = integers + row * NUM_INTEGERS
    return (tl.load(address + LISTS) != 0) | (tl.load(address + COUNTS) != 0)


@triton.jit
def load_scores(logits_line, scores_line, uses_scores, ids, vocab):
    """float32 scores of some ids, -inf beyond the vocabulary: the line's logits, or what adjustments made of them."""
    found = tl.load(logits_line + ids, mask=(ids < vocab) & (not uses_scores), other=-INFINITY).to(tl.float32)
    if scores_line is not None:
        found = tl.where(
            uses_scores, tl.load(scores_line + ids, mask=(ids < vocab) & uses_scores, other=-INFINITY), found
        )
    return found


@triton.jit
def distances(scores, peak, temperature):
    """How far each score lies below the peak, in units of the temperature: 0 to inf."""
    return tl.div_rn(peak - scores, temperature)


@triton.jit
def whole(weights):
    """Weights as whole numbers of 2^-44."""
    return (weights * ONE).to(tl.int64)


@triton.jit
def target_of(uniform, total):
    """Which of `total` units a random number in [0, 1) points at."""
    return tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)


@triton.jit
def uniform_of(integers, row, position):
    """The number in [0, 1) of `sampling.philox.uniforms` for the row's seed, its sequence and this position."""
    seed = tl.load(integers + row * NUM_INTEGERS + SEED)
    sequence = tl.load(integers + row * NUM_INTEGERS + SEQUENCE_INDEX)
    high, low, _, _ = tl.philox(seed, position.to(tl.uint32), 0, sequence.to(tl.uint32), 0)
    bits = (high.to(tl.uint64) << 21) ^ (low.to(tl.uint64) >> 11)
    return bits.to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def greatest(peaks, ids, num_chunks, CHUNKS: tl.constexpr):
    """(score, id) of the greatest of a line from those of its chunks; of equals the lowest id."""
    chunks = tl.arange(0, CHUNKS)
    peaks_C = tl.load(peaks + chunks, mask=chunks < num_chunks, other=-INFINITY)
    ids_C = tl.load(ids + chunks, mask=chunks < num_chunks, other=NO_ID)
    peak = tl.max(peaks_C, 0)
    return peak, tl.min(tl.where(peaks_C == peak, ids_C, NO_ID), 0)


@triton.jit
def peak_of(peaks, ids, changed_peaks, changed_ids, integers, row, num_chunks, CHUNKS: tl.constexpr):
    """(peak, its id, whether adjusted scores count) of a line. Where they leave no id at all the logits count."""
    peak, best = greatest(peaks, ids, num_chunks, CHUNKS)
    uses_scores = row < 0
    if changed_peaks is not None:
        if is_adjusted(integers, row):
            changed_peak, changed_best = greatest(changed_peaks, changed_ids, num_chunks, CHUNKS)
            if changed_peak > -INFINITY:
                peak, best, uses_scores = changed_peak, changed_best, row >= 0
    return peak, best, uses_scores
