"""The passes of sampling over all logits, cut into chunks so that few lines still use all of a card.

L lines of logits, R rows of the batch (line l belongs to row rows_L[l]; -1: to none), V vocabulary, C chunks of a line.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from pageflight.kernels.sampling_rows import (
    CHUNK,
    INFINITY,
    NO_ID,
    distances,
    is_greedy,
    load_scores,
    peak_of,
    temperature_of,
    whole,
)


@triton.jit
def look_kernel(logits, rows, peaks, ids, sums, are_bad, vocab, num_chunks, stride_logits):
    """One program per (line, chunk): its greatest logit and where, the sum of exp(logit - it), and whether one is bad.

    NaN and +inf are bad. They are left out of everything else.
    """
    line, chunk = tl.program_id(0), tl.program_id(1)
    place = line * num_chunks + chunk
    if tl.load(rows + line) < 0:
        return
    here = chunk * CHUNK + tl.arange(0, CHUNK)
    found = tl.load(logits + line.to(tl.int64) * stride_logits + here, mask=here < vocab, other=-INFINITY)
    found = found.to(tl.float32)
    is_number = found < INFINITY  # false for NaN as well
    found = tl.where(is_number, found, -INFINITY)
    peak = tl.max(found, 0)
    tl.store(peaks + place, peak)
    tl.store(ids + place, tl.min(tl.where((found == peak) & (here < vocab), here, NO_ID), 0))
    tl.store(sums + place, tl.sum(tl.exp(found - tl.where(peak == -INFINITY, 0.0, peak)), 0))
    tl.store(are_bad + place, tl.max((~is_number).to(tl.int32), 0))


@triton.jit
def weigh_kernel(
    logits,
    rows,
    scores,
    floats,
    integers,
    peaks,
    ids,
    changed_peaks,
    changed_ids,
    weights,
    vocab,
    num_chunks,
    stride_logits,
    ADJUST: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """One program per (line, chunk) of rows that draw: the sum of the chunk's weights, int64 [L, C]."""
    line, chunk = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + line).to(tl.int64)
    if row < 0:
        return
    if is_greedy(floats, integers, row):
        return
    begin = line * num_chunks
    peak, _, uses_scores = peak_of(
        peaks + begin,
        ids + begin,
        changed_peaks + begin if ADJUST else None,
        changed_ids + begin if ADJUST else None,
        integers,
        row,
        num_chunks,
        CHUNKS,
    )
    here = chunk * CHUNK + tl.arange(0, CHUNK)
    scores_line = scores + line.to(tl.int64) * vocab if ADJUST else None
    found = load_scores(logits + line.to(tl.int64) * stride_logits, scores_line, uses_scores, here, vocab)
    found = tl.where(found < INFINITY, found, -INFINITY)  # a bad line gets some id too
    safe_peak = tl.where(peak == -INFINITY, 0.0, peak)
    drawn = tl.exp(-distances(found, safe_peak, temperature_of(floats, row)))
    tl.store(weights + begin + chunk, tl.sum(whole(drawn), 0))
