"""The passes of sampling over all logits, cut into chunks so that few lines still use all of a card.

L lines of logits, R rows of the batch (line l belongs to row rows_L[l]; -1: to none), V vocabulary, C chunks of a line.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: SIM102

from __future__ import annotations

import triton
import triton.language as tl

from pageflight.kernels.sampling_rows import (
    CHUNK,
    FREQUENCY,
    INFINITY,
    LARGEST,
    NO_ID,
    NUM_FLOATS,
    NUM_INTEGERS,
    NUM_LISTED,
    PRESENCE,
    REPETITION,
    distances,
    has_penalties,
    is_adjusted,
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
def penalised(scores, counts, floats, row):
    """Scores after penalties. `counts`: 1 for an id of the prompt, plus 2 for each time it is in the output."""
    repetition = tl.load(floats + row * NUM_FLOATS + REPETITION).to(tl.float32)
    presence = tl.load(floats + row * NUM_FLOATS + PRESENCE).to(tl.float32)
    frequency = tl.load(floats + row * NUM_FLOATS + FREQUENCY).to(tl.float32)
    times = counts >> 1
    repeated = tl.where(scores < 0, scores * repetition, tl.div_rn(scores, repetition))
    lowered = repeated - times.to(tl.float32) * frequency - tl.where(times > 0, presence, 0.0)
    return tl.where(counts > 0, lowered, scores)


@triton.jit
def adjust_kernel(
    logits,
    rows,
    scores,
    counts,
    listed_ids,
    listed_values,
    floats,
    integers,
    peaks,
    ids,
    vocab,
    num_chunks,
    stride_logits,
    stride_counts,
    stride_listed,
    PENALISE: tl.constexpr,
    LIST: tl.constexpr,
    LIST_TILE: tl.constexpr,
):
    """One program per (line, chunk) of adjusted rows: float32 scores [L, V], their greatest per chunk and where.

    First the listed values are added (bias, or -inf to forbid), then come the penalties. What overflows is the greatest
    number. A listed id is computed a second time by itself: lists are short, and no id is in one twice.
    """
    line, chunk = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + line).to(tl.int64)
    if row < 0:
        return
    if not is_adjusted(floats, integers, row, PENALISE, LIST):
        return
    first = chunk * CHUNK
    here = first + tl.arange(0, CHUNK)
    logits_line = logits + line.to(tl.int64) * stride_logits
    scores_line = scores + line.to(tl.int64) * vocab
    found = tl.load(logits_line + here, mask=here < vocab, other=-INFINITY).to(tl.float32)
    if PENALISE:
        if has_penalties(floats, row):
            counted = tl.load(counts + row * stride_counts + here, mask=here < vocab, other=0)
            found = tl.minimum(penalised(found, counted, floats, row), LARGEST)
    tl.store(scores_line + here, found, mask=here < vocab)
    if LIST:
        tl.debug_barrier()
        num_listed = tl.load(integers + row * NUM_INTEGERS + NUM_LISTED).to(tl.int32)
        for begin in range(0, num_listed, LIST_TILE):
            entries = begin + tl.arange(0, LIST_TILE)
            named = tl.load(listed_ids + row * stride_listed + entries, mask=entries < num_listed, other=-1)
            inside = (named >= first) & (named < first + CHUNK) & (named < vocab)
            value = tl.load(listed_values + row * stride_listed + entries, mask=inside, other=0.0)
            changed = tl.load(logits_line + named, mask=inside, other=0.0).to(tl.float32) + value
            if PENALISE:
                counted = tl.load(counts + row * stride_counts + named, mask=inside, other=0)
                changed = penalised(changed, counted, floats, row)
            tl.store(scores_line + named, tl.minimum(changed, LARGEST), mask=inside)
        tl.debug_barrier()
        found = tl.load(scores_line + here, mask=here < vocab, other=-INFINITY)
    peak = tl.max(found, 0)
    place = line * num_chunks + chunk
    tl.store(peaks + place, peak)
    tl.store(ids + place, tl.min(tl.where((found == peak) & (here < vocab), here, NO_ID), 0))


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
    PENALISE: tl.constexpr,
    LIST: tl.constexpr,
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
        changed_peaks + begin if PENALISE or LIST else None,
        changed_ids + begin if PENALISE or LIST else None,
        floats,
        integers,
        row,
        num_chunks,
        PENALISE,
        LIST,
        CHUNKS,
    )
    here = chunk * CHUNK + tl.arange(0, CHUNK)
    scores_line = scores + line.to(tl.int64) * vocab if PENALISE or LIST else None
    found = load_scores(logits + line.to(tl.int64) * stride_logits, scores_line, uses_scores, here, vocab)
    found = tl.where(found < INFINITY, found, -INFINITY)  # a bad line gets some id too
    safe_peak = tl.where(peak == -INFINITY, 0.0, peak)
    drawn = tl.exp(-distances(found, safe_peak, temperature_of(floats, row)))
    tl.store(weights + begin + chunk, tl.sum(whole(drawn), 0))
