"""What rows change about their logits before they draw, on the device, as `sampling.adjustments` does on numpy.

L lines of logits, R rows of the batch (line l belongs to row rows_L[l]; -1: to none), V vocabulary, C chunks of a line,
B biased entries, M masked ones.

A row's lists are one int32 tensor of its own, which its parameters name by address: rows without any take no memory and
a captured graph finds those of whoever holds the row now. In it, one after another:

    B, M                          two words
    where biases begin  [C + 1]   by chunk of their ids, as the next
    where masks begin   [C + 1]
    biased ids, values  [B] each  values as bits of float32; -1: padding
    masked ids          [M]
    their ends          [M]       masked while the row has fewer tokens
    places, lengths     [M] each  the ids, in this tensor, that must precede
    ids that precede
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

from pageflight.core.request import SamplingParams
from pageflight.kernels.builds import KernelBuild
from pageflight.kernels.sampling_rows import (
    CHUNK,
    COUNTS,
    FREQUENCY,
    INFINITY,
    LARGEST,
    LISTS,
    NO_ID,
    NUM_FLOATS,
    NUM_INTEGERS,
    PRESENCE,
    REPETITION,
    is_adjusted,
)

Int32Array = NDArray[np.int32]
LIST_TILE = 128
_ALWAYS = 2**31 - 1


def packed_lists(sampling: SamplingParams, num_prompt: int, vocab_size: int) -> Int32Array | None:
    """A row's lists as its tensor holds them; None where it has none. Ids beyond the vocabulary are left out."""
    biases = [(token, value) for token, value in sampling.logit_bias if 0 <= token < vocab_size]
    masks: list[tuple[int, int, tuple[int, ...]]] = []
    if sampling.min_tokens > 0:
        end = min(num_prompt + sampling.min_tokens, _ALWAYS)
        masks += [(token, end, ()) for token in sampling.stop_token_ids if 0 <= token < vocab_size]
    for word in sampling.bad_words_ids:
        if word and all(0 <= token < vocab_size for token in word):
            masks.append((word[-1], _ALWAYS, word[:-1]))
    if not biases and not masks:
        return None
    borders = np.arange(triton.cdiv(vocab_size, CHUNK.value) + 1) * CHUNK.value
    ids, values = (
        np.array([token for token, _ in biases], np.int64),
        np.array([value for _, value in biases], np.float32),
    )
    bias_ids, bias_values, bias_begins = _tiled(ids, values, borders)
    masks.sort(key=lambda mask: mask[0])
    mask_ids = np.array([token for token, _, _ in masks], np.int64)
    lengths = np.array([len(before) for _, _, before in masks], np.int64)
    ends = np.array([end for _, end, _ in masks], np.int64)
    preceding = np.array([token for _, _, before in masks for token in before], np.int64)
    sizes = np.array([len(bias_ids), len(masks)])
    parts = [sizes, bias_begins, np.searchsorted(mask_ids, borders)]
    parts += [bias_ids, bias_values.view(np.int32), mask_ids, ends]
    first = sum(part.size for part in parts) + 2 * len(masks)
    parts += [first + np.cumsum(lengths) - lengths, lengths, preceding]
    packed: Int32Array = np.concatenate([part.astype(np.int32) for part in parts])
    return packed


def packed_counts(token_ids: Int32Array, num_prompt: int) -> tuple[Int32Array, Int32Array]:
    """(ids, their counts) of a row's prompt and the output that it brings; all others are 0.

    A count is 1 for an id of the prompt plus 2 for each time in the output.
    """
    ids, inverse = np.unique(token_ids, return_inverse=True)
    counts = 2 * np.bincount(inverse[num_prompt:], minlength=ids.size)
    counts[np.unique(inverse[:num_prompt])] += 1
    return ids.astype(np.int32), counts.astype(np.int32)


def _tiled(
    ids_B: NDArray[np.int64], values_B: NDArray[np.float32], borders: NDArray[np.int64]
) -> tuple[Int32Array, NDArray[np.float32], NDArray[np.int64]]:
    """(ids, values, where the entries of each chunk begin) in whole tiles, none of which names an id twice.

    The tiles of a chunk are added one after another, so an id that is named twice gets its values in their order.
    """
    order = np.argsort(ids_B, kind="stable")
    ids, values = ids_B[order], values_B[order]
    occurrence = np.arange(ids.size) - np.searchsorted(ids, ids)
    order = np.lexsort((ids, occurrence, ids // CHUNK.value))
    ids, values, occurrence = ids[order], values[order], occurrence[order]
    group = np.stack([ids // CHUNK.value, occurrence])
    is_first = np.ones(ids.size, np.bool_)
    is_first[1:] = (group[:, 1:] != group[:, :-1]).any(0)
    firsts = np.flatnonzero(is_first)
    sizes = np.diff(firsts, append=ids.size)
    padded_sizes = -(-sizes // LIST_TILE) * LIST_TILE
    begins = np.cumsum(padded_sizes) - padded_sizes
    places = np.arange(ids.size) + np.repeat(begins - firsts, sizes)
    tiled_ids, tiled_values = np.full(padded_sizes.sum(), -1, np.int32), np.zeros(padded_sizes.sum(), np.float32)
    tiled_ids[places], tiled_values[places] = ids, values
    at_borders = np.searchsorted(ids[firsts], borders)  # groups that begin below each border
    return tiled_ids, tiled_values, np.append(begins, padded_sizes.sum())[at_borders]


@triton.jit
def _address(integers, row, COLUMN: tl.constexpr):
    return tl.load(integers + row * NUM_INTEGERS + COLUMN)


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
def _add_biases(scores_line, lists, chunk, num_chunks, TILE: tl.constexpr):
    num_biases = tl.load(lists)
    ids = lists + 2 + 2 * (num_chunks + 1)
    for begin in range(tl.load(lists + 2 + chunk), tl.load(lists + 3 + chunk), TILE):
        entries = begin + tl.arange(0, TILE)
        named = tl.load(ids + entries)
        value = tl.load(ids + num_biases + entries).to(tl.float32, bitcast=True)
        biased = tl.load(scores_line + named, mask=named >= 0, other=0.0) + value
        tl.store(scores_line + named, biased, mask=named >= 0)
        tl.debug_barrier()  # the next tile may name the same id


@triton.jit
def _mask(scores_line, lists, tokens, num_tokens, chunk, num_chunks, TILE: tl.constexpr):
    """`tokens`: where the row's begin, `num_tokens` of them."""
    num_biases, num_masks = tl.load(lists), tl.load(lists + 1)
    begins = lists + 2 + num_chunks + 1
    ids = begins + num_chunks + 1 + 2 * num_biases
    end = tl.load(begins + chunk + 1)
    for begin in range(tl.load(begins + chunk), end, TILE):
        entries = begin + tl.arange(0, TILE)
        inside = entries < end
        named = tl.load(ids + entries, mask=inside, other=0)
        until = tl.load(ids + num_masks + entries, mask=inside, other=0)
        places = tl.load(ids + 2 * num_masks + entries, mask=inside, other=0)
        lengths = tl.load(ids + 3 * num_masks + entries, mask=inside, other=0)
        is_masked = inside & (num_tokens < until) & (lengths <= num_tokens)
        for index in range(tl.max(lengths, 0)):
            compared = is_masked & (index < lengths)
            wanted = tl.load(lists + places + index, mask=compared, other=0)
            found = tl.load(tokens + num_tokens - lengths + index, mask=compared, other=0)
            is_masked = is_masked & ((index >= lengths) | (wanted == found))
        tl.store(scores_line + named, -INFINITY, mask=is_masked)


@triton.jit
def adjust_kernel(
    state,
    logits,
    rows,
    scores,
    floats,
    integers,
    num_tokens,
    peaks,
    ids,
    vocab,
    num_chunks,
    stride_logits,
    stride_tokens,
    TILE: tl.constexpr,
):
    """One program per (line, chunk) of adjusted rows: float32 scores [L, V], their greatest per chunk and where.

    Biases are added, then come the masks, then penalties. What overflows is the greatest number.
    """
    line, chunk = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + line).to(tl.int64)
    if row < 0:
        return
    if not is_adjusted(integers, row):
        return
    here = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = here < vocab
    scores_line = scores + line.to(tl.int64) * vocab
    logits_line = logits + line.to(tl.int64) * stride_logits
    found = tl.load(logits_line + here, mask=inside, other=-INFINITY).to(tl.float32)
    lists = _address(integers, row, LISTS)
    if lists != 0:
        tl.store(scores_line + here, found, mask=inside)
        tl.debug_barrier()
        words = lists.to(tl.pointer_type(tl.int32))
        _add_biases(scores_line, words, chunk, num_chunks, TILE)
        _mask(scores_line, words, state + row * stride_tokens, tl.load(num_tokens + row), chunk, num_chunks, TILE)
        tl.debug_barrier()
        found = tl.load(scores_line + here, mask=inside, other=-INFINITY)
    counts = _address(integers, row, COUNTS)
    if counts != 0:
        counted = tl.load(counts.to(tl.pointer_type(tl.int32)) + here, mask=inside, other=0)
        found = penalised(found, counted, floats, row)
    found = tl.minimum(found, LARGEST)
    tl.store(scores_line + here, found, mask=inside)
    peak = tl.max(found, 0)
    place = line * num_chunks + chunk
    tl.store(peaks + place, peak)
    tl.store(ids + place, tl.min(tl.where((found == peak) & inside, here, NO_ID), 0))


BUILDS = (
    KernelBuild(
        name="sampling_adjust_fp32",
        kernel=adjust_kernel,
        signature={
            **dict.fromkeys(("state", "rows", "num_tokens", "ids"), "*i32"),
            **dict.fromkeys(("logits", "scores", "peaks"), "*fp32"),
            "floats": "*fp64",
            "integers": "*i64",
            **dict.fromkeys(("vocab", "num_chunks", "stride_logits", "stride_tokens"), "i32"),
        },
        constants={"TILE": LIST_TILE},
    ),
)
