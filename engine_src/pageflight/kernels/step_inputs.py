# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The inputs of a step made from rows that live on the device, and its sampled ids put back into them.

Shapes: R rows, P most tokens of a row, B most blocks of a row; S rows that run, T packed tokens, L rows that sample, U
words that change.

What rows hold lies in one int32 tensor, `state`: `tokens_RP` from word 0 on, `tables_RB` from `tables_at` on. Changes
come in one copy: as pairs of word and value, or, where consecutive words change as a prompt does, as N runs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pageflight.kernels.builds import KernelBuild

TILE = 256


@triton.jit(do_not_specialize=["num_words"])
def scatter_kernel(state, words, values, num_words, TILE: tl.constexpr):
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = index < num_words
    word = tl.load(words + index, mask=inside, other=0)
    tl.store(state + word.to(tl.int64), tl.load(values + index, mask=inside, other=0), mask=inside)


@triton.jit
def fill_kernel(state, begins, offsets, values, TILE: tl.constexpr):
    """One program per (run, tile of it)."""
    run = tl.program_id(0)
    first = tl.load(offsets + run)
    index = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = index < tl.load(offsets + run + 1) - first
    value = tl.load(values + first + index, mask=inside, other=0)
    tl.store(state + tl.load(begins + run).to(tl.int64) + index, value, mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def prepare_kernel(
    state,
    num_tokens_R,
    rows_S,
    starts_S,
    token_begins,
    sequences_T,
    ids_T,
    positions_T,
    slots_T,
    lens_S,
    num_tokens,
    stride_tokens,
    tables_at,
    stride_tables,
    DECODE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = index < num_tokens
    sequence = index if DECODE else tl.load(sequences_T + index, mask=inside, other=0)
    row = tl.load(rows_S + sequence, mask=inside, other=-1)
    real = inside & (row >= 0)
    position = tl.load(starts_S + sequence, mask=real, other=0)
    is_last = real
    if not DECODE:
        position += index - tl.load(token_begins + sequence, mask=real, other=0)
        is_last = real & (index + 1 == tl.load(token_begins + sequence + 1, mask=real, other=0))
    wide = row.to(tl.int64)
    ids = tl.load(state + wide * stride_tokens + position, mask=real, other=0)
    block = tl.load(state + tables_at + wide * stride_tables + position // BLOCK_SIZE, mask=real, other=0)
    tl.store(ids_T + index, ids, mask=inside)
    tl.store(positions_T + index, tl.where(real, position, 0), mask=inside)
    tl.store(slots_T + index, tl.where(real, block * BLOCK_SIZE + position % BLOCK_SIZE, -1), mask=inside)
    tl.store(num_tokens_R + row, position + 1, mask=is_last)
    if DECODE:
        tl.store(lens_S + index, tl.where(real, position + 1, 0), mask=inside)


@triton.jit(do_not_specialize=["num_lines"])
def append_kernel(
    state, num_tokens_R, rows_L, ids_L, log_probs_L, are_bad_L, results, num_lines, stride_tokens, TILE: tl.constexpr
):
    """`results` [3, L]: ids, bits of the log probabilities, and whether a line is bad."""
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = index < num_lines
    row = tl.load(rows_L + index, mask=inside, other=-1)
    real = inside & (row >= 0)
    ids = tl.load(ids_L + index, mask=inside, other=0)
    place = tl.load(num_tokens_R + row, mask=real, other=0)
    tl.store(state + row.to(tl.int64) * stride_tokens + place, ids, mask=real & (place < stride_tokens))
    tl.store(results + index, ids, mask=inside)
    log_probs = tl.load(log_probs_L + index, mask=inside, other=0.0)
    tl.store(results + num_lines + index, log_probs.to(tl.int32, bitcast=True), mask=inside)
    are_bad = tl.load(are_bad_L + index, mask=inside, other=0)
    tl.store(results + 2 * num_lines + index, are_bad.to(tl.int32), mask=inside)


def scatter(state: Tensor, words_U: Tensor, values_U: Tensor) -> None:
    """state[words_U] = values_U, all int32. No word twice."""
    assert state.is_contiguous() and words_U.is_contiguous() and values_U.is_contiguous()
    num_words = len(words_U)
    if num_words:
        scatter_kernel[(triton.cdiv(num_words, TILE),)](state, words_U, values_U, num_words, TILE=TILE)


def fill(state: Tensor, begins_N: Tensor, offsets: Tensor, values: Tensor, longest: int) -> None:
    """Words from begins_N[n] on become `values[offsets[n] : offsets[n + 1]]`, all int32, at most `longest` of them.

    No word twice.
    """
    assert state.is_contiguous() and values.is_contiguous() and len(offsets) == len(begins_N) + 1
    if len(begins_N):
        fill_kernel[(len(begins_N), triton.cdiv(longest, TILE))](state, begins_N, offsets, values, TILE=TILE)


def prepare(
    state: Tensor,
    num_tokens_R: Tensor,
    rows_S: Tensor,
    starts_S: Tensor,
    *,
    ids_T: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    lens_S: Tensor | None,
    token_begins: Tensor | None = None,
    sequences_T: Tensor | None = None,
    stride_tokens: int,
    tables_at: int,
    stride_tables: int,
    block_size: int,
) -> None:
    """Ids, positions and slots of a step's tokens, all int32; for padding, a row of -1, 0 and slot -1.

    Without `token_begins` [S + 1] and `sequences_T` every row runs one token, and `lens_S` gets the keys that it sees.
    `num_tokens_R` gets, for rows that run, the tokens up to and with the last one of this step.
    """
    is_decode = token_begins is None
    assert is_decode == (sequences_T is None) == (lens_S is not None)
    num_tokens = len(ids_T)
    prepare_kernel[(triton.cdiv(num_tokens, TILE),)](
        state,
        num_tokens_R,
        rows_S,
        starts_S,
        rows_S if token_begins is None else token_begins,
        rows_S if sequences_T is None else sequences_T,
        ids_T,
        positions_T,
        slots_T,
        slots_T if lens_S is None else lens_S,
        num_tokens,
        stride_tokens,
        tables_at,
        stride_tables,
        DECODE=is_decode,
        BLOCK_SIZE=block_size,
        TILE=TILE,
    )


def append(
    state: Tensor,
    num_tokens_R: Tensor,
    rows_L: Tensor,
    ids_L: Tensor,
    log_probs_L: Tensor,
    are_bad_L: Tensor,
    results: Tensor,
    *,
    stride_tokens: int,
) -> None:
    """Sampled ids become their rows' next tokens, where those have room; and what the host wants goes to `results`.

    `results`: int32 [3, L], contiguous: ids, the bits of the float32 log probabilities, whether a line is bad.
    """
    num_lines = len(rows_L)
    assert results.is_contiguous() and results.shape == (3, num_lines)
    append_kernel[(triton.cdiv(num_lines, TILE),)](
        state,
        num_tokens_R,
        rows_L,
        ids_L,
        log_probs_L,
        are_bad_L,
        results,
        num_lines,
        stride_tokens,
        TILE=TILE,
    )


_WORDS = dict.fromkeys(("state", "num_tokens_R"), "*i32")
_PREPARED = dict.fromkeys(
    ("rows_S", "starts_S", "token_begins", "sequences_T", "ids_T", "positions_T", "slots_T", "lens_S"), "*i32"
)
_NUMBERS = dict.fromkeys(("num_tokens", "stride_tokens", "tables_at", "stride_tables"), "i32")

BUILDS = (
    KernelBuild(
        name="scatter_words",
        kernel=scatter_kernel,
        signature={"state": "*i32", "words": "*i32", "values": "*i32", "num_words": "i32"},
        constants={"TILE": TILE},
    ),
    KernelBuild(
        name="fill_runs",
        kernel=fill_kernel,
        signature=dict.fromkeys(("state", "begins", "offsets", "values"), "*i32"),
        constants={"TILE": TILE},
    ),
    *(
        KernelBuild(
            name=f"prepare_{'decode' if decode else 'mixed'}_step",
            kernel=prepare_kernel,
            signature={**_WORDS, **_PREPARED, **_NUMBERS},
            constants={"DECODE": decode, "BLOCK_SIZE": 32, "TILE": TILE},
        )
        for decode in (True, False)
    ),
    KernelBuild(
        name="append_sampled_ids",
        kernel=append_kernel,
        signature={
            **_WORDS,
            "rows_L": "*i32",
            "ids_L": "*i32",
            "log_probs_L": "*fp32",
            "are_bad_L": "*i1",
            "results": "*i32",
            "num_lines": "i32",
            "stride_tokens": "i32",
        },
        constants={"TILE": TILE},
    ),
)
