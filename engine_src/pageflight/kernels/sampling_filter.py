"""Draws among a part of the vocabulary: top-k, min-p and top-p without sorting, as `sampling.filters` does on numpy.

L lines of logits, R rows of the batch (line l belongs to row rows_L[l]; -1: to none), V vocabulary.

Where to cut is found by bisection over the bits of float32 numbers, which order as the numbers do if these are not
negative: 31 passes find the exact number. What certainly lies outside is left out first, so that the passes read a
short list instead of the vocabulary; when more than `LIST_SIZE` ids are left they read the vocabulary after all.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from pageflight.kernels.sampling_rows import (
    INFINITY,
    MIN_P,
    NUM_FLOATS,
    NUM_INTEGERS,
    ONE,
    TOP_K,
    TOP_P,
    distances,
    is_filtered,
    is_greedy,
    load_scores,
    peak_of,
    target_of,
    temperature_of,
    uniform_of,
    whole,
)

LIST_SIZE = tl.constexpr(4096)
TILE = tl.constexpr(1024)
ONE_BITS = tl.constexpr(0x3F800000)  # of 1.0, the greatest weight


@triton.jit
def _rank(weights):
    """The bits of weights, turned round: 0 for the weight 1, and the smaller the weight the greater."""
    return -(weights.to(tl.int32, bitcast=True) - ONE_BITS)


@triton.jit
def _weight_of_rank(rank):
    return (-(rank - ONE_BITS)).to(tl.float32, bitcast=True)


@triton.jit
def _distances_at(source, places, size, LISTED: tl.constexpr):
    """Distances of some places of the list, or of some ids when nothing was listed; inf behind the end.

    `source`: the line's logits and scores, which of them count, its list, its peak and its temperature.
    """
    logits_line, scores_line, uses_scores, listed_line, peak, temperature = source
    if LISTED:
        return tl.load(listed_line + places, mask=places < size, other=INFINITY)
    scores = load_scores(logits_line, scores_line, uses_scores, places, size)
    return distances(scores, peak, temperature)


@triton.jit
def _bound_of_top_k(source, vocab, top_k):
    """A distance that at least `top_k` ids do not exceed: the k-th least of the least ones of `TILE` groups of ids."""
    least = tl.full((TILE,), INFINITY, tl.float32)
    for begin in range(0, vocab, TILE):
        least = tl.minimum(least, _distances_at(source, begin + tl.arange(0, TILE), vocab, False))
    bits = least.to(tl.int32, bitcast=True)
    found = tl.zeros((), tl.int32)
    for step in range(31):
        attempt = found | (1 << (30 - step))
        found = tl.where(tl.sum((bits < attempt).to(tl.int32), 0) < top_k, attempt, found)
    return found.to(tl.float32, bitcast=True)


@triton.jit
def _kth_distance(source, size, top_k, LISTED: tl.constexpr):
    """The bits of the k-th least distance: the greatest number that fewer than k distances lie below."""
    found = tl.zeros((), tl.int32)
    for step in range(31):
        attempt = found | (1 << (30 - step))
        count = tl.zeros((TILE,), tl.int32)
        for begin in range(0, size, TILE):
            places = begin + tl.arange(0, TILE)
            bits = _distances_at(source, places, size, LISTED).to(tl.int32, bitcast=True)
            count += ((bits < attempt) & (places < size)).to(tl.int32)
        found = tl.where(tl.sum(count, 0) < top_k, attempt, found)
    return found


@triton.jit
def _weights_at(source, places, size, kth, min_p, LISTED: tl.constexpr):
    """(weights, which of them top-k and min-p leave) at some places."""
    far = _distances_at(source, places, size, LISTED)
    weights = tl.exp(-far)
    return weights, (far.to(tl.int32, bitcast=True) <= kth) & (weights >= min_p) & (places < size)


@triton.jit
def _sum_above(source, size, kth, min_p, border, LISTED: tl.constexpr):
    """(sum of the weights of lower rank than `border`, number of those of this rank)."""
    sums = tl.zeros((TILE,), tl.int64)
    equal = tl.zeros((TILE,), tl.int32)
    for begin in range(0, size, TILE):
        weights, is_left = _weights_at(source, begin + tl.arange(0, TILE), size, kth, min_p, LISTED)
        rank = _rank(weights)
        sums += tl.where(is_left & (rank < border), whole(weights), 0)
        equal += (is_left & (rank == border)).to(tl.int32)
    return tl.sum(sums, 0), tl.sum(equal, 0)


@triton.jit
def _choose(source, size, top_k, top_p, min_p, all_weights, uniform, LISTED: tl.constexpr):
    """The place drawn among `size`. `all_weights`: the sum over the vocabulary, what top-p is a part of when alone."""
    kth = tl.full((), 0x7F800000, tl.int32)  # infinitely far
    if top_k > 0:
        kth = _kth_distance(source, size, top_k, LISTED)
    border = tl.full((), ONE_BITS + 1, tl.int32)
    skipped = tl.zeros((), tl.int32)
    total, _ = _sum_above(source, size, kth, min_p, border, LISTED)
    if top_p < 1.0:
        before_cut = total if (top_k > 0) | (min_p > 0.0) else all_weights
        wanted = tl.ceil(top_p * before_cut.to(tl.float64)).to(tl.int64)
        wanted = tl.minimum(tl.maximum(wanted, 1), total)
        border = tl.zeros((), tl.int32)
        for step in range(31):  # as for top-k, from the greatest weight down, by sums instead of counts
            attempt = border | (1 << (30 - step))
            above, _ = _sum_above(source, size, kth, min_p, attempt, LISTED)
            border = tl.where(above < wanted, attempt, border)
        # of equals at the border only as many as are needed, those with the highest ids
        above, num_equal = _sum_above(source, size, kth, min_p, border, LISTED)
        equal = whole(_weight_of_rank(border))
        needed = tl.maximum((wanted - above + equal - 1) // tl.maximum(equal, 1), 1)
        needed = tl.minimum(needed, num_equal)
        skipped = num_equal - needed.to(tl.int32)
        total = above + needed * equal
    return _draw(source, size, kth, min_p, border, skipped, target_of(uniform, total), LISTED)


@triton.jit
def _draw(source, size, kth, min_p, border, skipped, target, LISTED: tl.constexpr):
    """Where the sum of the weights that are kept passes `target`, in the order of ids.

    Kept are those of lower rank than `border`, and of those of its rank all but the first `skipped`.
    """
    drawn = tl.zeros((), tl.int32)
    passed = tl.zeros((), tl.int64)
    equal_passed = tl.zeros((), tl.int32)
    for begin in range(0, size, TILE):
        weights, is_left = _weights_at(source, begin + tl.arange(0, TILE), size, kth, min_p, LISTED)
        rank = _rank(weights)
        is_equal = (is_left & (rank == border)).to(tl.int32)
        order = equal_passed + tl.cumsum(is_equal, 0) - is_equal
        is_kept = is_left & ((rank < border) | ((is_equal > 0) & (order >= skipped)))
        ends = passed + tl.cumsum(tl.where(is_kept, whole(weights), 0), 0)
        tile_end = tl.max(ends, 0)
        if (passed <= target) & (target < tile_end):
            drawn = begin + tl.sum((ends <= target).to(tl.int32), 0)
        passed = tile_end
        equal_passed += tl.sum(is_equal, 0)
    return drawn


@triton.jit
def filter_kernel(
    logits,
    rows,
    scores,
    floats,
    integers,
    num_tokens,
    peaks,
    ids,
    changed_peaks,
    changed_ids,
    are_bad,
    weights,
    listed,
    listed_ids,
    drawn_ids,
    vocab,
    num_chunks,
    stride_logits,
    ADJUST: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """One program per line: the id of rows with top-k, top-p or min-p; other rows are left alone.

    `listed`, `listed_ids`: workspace [L, LIST_SIZE], float32 and int32.
    """
    line = tl.program_id(0)
    row = tl.load(rows + line).to(tl.int64)
    if row < 0:
        return
    if is_greedy(floats, integers, row) | (not is_filtered(floats, integers, row, vocab)):
        return
    begin_chunks = line * num_chunks
    peak, _, uses_scores = peak_of(
        peaks + begin_chunks,
        ids + begin_chunks,
        changed_peaks + begin_chunks if ADJUST else None,
        changed_ids + begin_chunks if ADJUST else None,
        integers,
        row,
        num_chunks,
        CHUNKS,
    )
    chunks = tl.arange(0, CHUNKS)
    all_weights = tl.sum(tl.load(weights + begin_chunks + chunks, mask=chunks < num_chunks, other=0), 0)
    num_bad = tl.sum(tl.load(are_bad + begin_chunks + chunks, mask=chunks < num_chunks, other=0), 0)
    if (num_bad > 0) | (all_weights <= 0):  # `finish_kernel` says so
        return
    logits_line = logits + line.to(tl.int64) * stride_logits
    listed_line = listed + line.to(tl.int64) * LIST_SIZE
    scores_line = listed_line  # stands for scores that are never read: a tuple cannot hold None
    if ADJUST:
        scores_line = scores + line.to(tl.int64) * vocab
    listed_ids_line = listed_ids + line.to(tl.int64) * LIST_SIZE
    temperature = temperature_of(floats, row)
    top_k = tl.load(integers + row * NUM_INTEGERS + TOP_K).to(tl.int32)
    top_k = tl.where(top_k < vocab, top_k, 0)
    top_p = tl.load(floats + row * NUM_FLOATS + TOP_P)
    min_p = tl.load(floats + row * NUM_FLOATS + MIN_P).to(tl.float32)
    uniform = uniform_of(integers, row, tl.load(num_tokens + row))

    # what cannot be kept, by bounds that are cheap: V ids of at most (1 - p) * total / V weigh at most (1 - p) * total,
    # so top-p alone drops them all (half of it leaves room for rounding)
    source = (logits_line, scores_line, uses_scores, listed_line, peak, temperature)
    bound = tl.full((), INFINITY, tl.float32)
    if (top_k > 0) & (top_k <= TILE):
        bound = _bound_of_top_k(source, vocab, top_k)
    least_weight = min_p
    if (top_k == 0) & (min_p <= 0.0) & (top_p < 1.0):
        least_weight = (0.5 * (1.0 - top_p) * all_weights.to(tl.float64) / ONE / vocab).to(tl.float32)
    size = tl.zeros((), tl.int32)
    for begin in range(0, vocab, TILE):
        here = begin + tl.arange(0, TILE)
        far = _distances_at(source, here, vocab, False)
        is_left = (far <= bound) & (tl.exp(-far) >= least_weight) & (here < vocab)
        places = size + tl.cumsum(is_left.to(tl.int32), 0) - 1
        fits = is_left & (places < LIST_SIZE)
        tl.store(listed_line + places, far, mask=fits)
        tl.store(listed_ids_line + places, here, mask=fits)
        size += tl.sum(is_left.to(tl.int32), 0)
    tl.debug_barrier()
    if size <= LIST_SIZE:
        place = _choose(source, size, top_k, top_p, min_p, all_weights, uniform, True)
        drawn = tl.load(listed_ids_line + place)
    else:
        drawn = _choose(source, vocab, top_k, top_p, min_p, all_weights, uniform, False)
    tl.store(drawn_ids + line, drawn)
