"""Sampling on the device, without the host waiting for anything: the ids that `sampling.Sampler` would choose.

L lines of logits, R rows of the batch (line l belongs to row rows_L[l]; -1: to none), V vocabulary, C chunks of a
line.

An id is drawn as on the host: by Philox's number for (seed, sequence, position) from the cumulative weights in the
order of ids. Both give the same id unless a float32 exponential, rounded differently, moves a border past the number.
Every row has its own parameters, so one launch serves greedy rows and all others; grids depend on shapes alone.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pageflight.core.request import SamplingParams
from pageflight.kernels.builds import KernelBuild
from pageflight.kernels.sampling_adjust import LIST_TILE, adjust_kernel
from pageflight.kernels.sampling_filter import LIST_SIZE, filter_kernel
from pageflight.kernels.sampling_rows import (
    CHUNK,
    COUNTS,
    INFINITY,
    NUM_INTEGERS,
    distances,
    greatest,
    is_filtered,
    is_greedy,
    load_scores,
    peak_of,
    target_of,
    temperature_of,
    uniform_of,
    whole,
)
from pageflight.kernels.sampling_scan import look_kernel, weigh_kernel


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowParameters:
    """What the rows asked for, on the device; `packed` gives the lines to copy into it when a row starts.

    `floats`: float64 [R, 6], `integers`: int64 [R, 5].
    """

    floats: Tensor
    integers: Tensor

    @staticmethod
    def empty(num_rows: int, device: torch.device | str) -> RowParameters:
        """Parameters of greedy rows."""
        floats, integers = packed(SamplingParams())
        return RowParameters(
            floats=floats.repeat(num_rows, 1).to(device), integers=integers.repeat(num_rows, 1).to(device)
        )


def packed(
    sampling: SamplingParams, sequence_index: int = 0, *, lists: Tensor | None = None, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The lines of a row in `floats` and `integers`, on the CPU.

    `lists`: int32 on the device, what `sampling_adjust.packed_lists` gives. `counts`: int32 [V] on the device, of a row
    with penalties, as `sampling_adjust.packed_counts` says; sampling keeps them. Both must live as long as the row.
    """
    seed = sampling.seed & 0xFFFF_FFFF_FFFF_FFFF
    floats = (
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
    )
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in (lists, counts))
    integers = (sampling.top_k, seed - (seed >> 63 << 64), sequence_index, *addresses)
    return torch.tensor(floats, dtype=torch.float64), torch.tensor(integers, dtype=torch.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sampled:
    """`ids_L` int32, `log_probs_L` float32 of the model's own distribution, `are_bad_L` bool: no id could be chosen.

    A bad line (NaN, +inf or nothing but -inf) has some id of the vocabulary and NaN, and leaves its counts alone.
    """

    ids_L: Tensor
    log_probs_L: Tensor
    are_bad_L: Tensor


class Workspace:
    """Device memory for up to `max_lines` lines; its contents mean nothing between calls."""

    def __init__(self, max_lines: int, vocab_size: int, device: torch.device | str) -> None:
        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.max_lines, self.vocab_size = max_lines, vocab_size
        self.num_chunks = triton.cdiv(vocab_size, CHUNK.value)
        shape = (max_lines, self.num_chunks)
        self.peaks, self.sums, self.changed_peaks = new(*shape), new(*shape), new(*shape)
        self.ids, self.changed_ids, self.are_bad = (new(*shape, dtype=torch.int32) for _ in range(3))
        self.weights = new(*shape, dtype=torch.int64)
        self.scores = new(max_lines, vocab_size)
        self.listed = new(max_lines, LIST_SIZE.value)
        self.listed_ids = new(max_lines, LIST_SIZE.value, dtype=torch.int32)

    def sampled(self, num_lines: int) -> Sampled:
        """New outputs."""
        device = self.peaks.device
        return Sampled(
            ids_L=torch.zeros(num_lines, dtype=torch.int32, device=device),
            log_probs_L=torch.empty(num_lines, device=device),
            are_bad_L=torch.zeros(num_lines, dtype=torch.bool, device=device),
        )


@triton.jit
def finish_kernel(
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
    sums,
    are_bad,
    weights,
    drawn_ids,
    log_probs,
    bad,
    vocab,
    num_chunks,
    stride_logits,
    ADJUST: tl.constexpr,
    FILTER: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """One program per line: the ids of rows that are greedy or draw from all, then everything else about the line."""
    line = tl.program_id(0)
    row = tl.load(rows + line).to(tl.int64)
    if row < 0:
        tl.store(drawn_ids + line, 0)
        tl.store(log_probs + line, float("nan"))
        tl.store(bad + line, 0)
        return
    begin = line * num_chunks
    chunks = tl.arange(0, CHUNKS)
    own_peak, _ = greatest(peaks + begin, ids + begin, num_chunks, CHUNKS)
    peak, best, uses_scores = peak_of(
        peaks + begin,
        ids + begin,
        changed_peaks + begin if ADJUST else None,
        changed_ids + begin if ADJUST else None,
        integers,
        row,
        num_chunks,
        CHUNKS,
    )
    num_bad = tl.sum(tl.load(are_bad + begin + chunks, mask=chunks < num_chunks, other=0), 0)
    is_bad = (num_bad > 0) | (own_peak == -INFINITY)
    logits_line = logits + line.to(tl.int64) * stride_logits
    drawn = tl.minimum(best, vocab - 1)
    if (not is_bad) & (not is_greedy(floats, integers, row)):
        if is_filtered(floats, integers, row, vocab) & FILTER:
            drawn = tl.load(drawn_ids + line)
        else:
            sums_C = tl.load(weights + begin + chunks, mask=chunks < num_chunks, other=0)
            target = target_of(uniform_of(integers, row, tl.load(num_tokens + row)), tl.sum(sums_C, 0))
            chunk = tl.sum((tl.cumsum(sums_C, 0) <= target).to(tl.int32), 0)
            chunk = tl.minimum(chunk, num_chunks - 1)  # lanes behind the last chunk count as reached by nothing
            target -= tl.sum(tl.where(chunks < chunk, sums_C, 0), 0)
            here = chunk * CHUNK + tl.arange(0, CHUNK)
            scores_line = scores + line.to(tl.int64) * vocab if ADJUST else None
            found = load_scores(logits_line, scores_line, uses_scores, here, vocab)
            drawing = tl.exp(-distances(found, peak, temperature_of(floats, row)))
            ends = tl.cumsum(whole(drawing), 0)
            drawn = tl.minimum(chunk * CHUNK + tl.sum((ends <= target).to(tl.int32), 0), vocab - 1)
    chosen = tl.load(logits_line + drawn, mask=not is_bad, other=0.0).to(tl.float32)
    peaks_C = tl.load(peaks + begin + chunks, mask=chunks < num_chunks, other=-INFINITY)
    exps_C = tl.load(sums + begin + chunks, mask=chunks < num_chunks, other=0.0)
    safe_peak = tl.where(own_peak == -INFINITY, 0.0, own_peak)
    total = tl.sum(exps_C * tl.exp(peaks_C - safe_peak), 0)
    log_prob = chosen - safe_peak - tl.log(tl.maximum(total, 1e-30))
    tl.store(drawn_ids + line, drawn)
    tl.store(log_probs + line, tl.where(is_bad, float("nan"), log_prob))
    tl.store(bad + line, is_bad.to(tl.int8))
    if ADJUST:
        counts = tl.load(integers + row * NUM_INTEGERS + COUNTS)
        if (counts != 0) & (not is_bad):
            place = counts.to(tl.pointer_type(tl.int32)) + drawn
            tl.store(place, tl.load(place) + 2)


def sample(
    logits_LV: Tensor,
    rows_L: Tensor,
    state: Tensor,
    num_tokens_R: Tensor,
    parameters: RowParameters,
    workspace: Workspace,
    *,
    stride_tokens: int,
    filters: bool = True,
    adjusts: bool = True,
    out: Sampled | None = None,
) -> Sampled:
    """The next id of each line. `logits_LV`: float32, fp16 or bf16, only read; `rows_L` int32, no row twice.

    `num_tokens_R` int32: tokens of each row's prompt and output so far, the position that its random number belongs to;
    `state` int32 holds those of row r from word r × `stride_tokens` on. `filters` False promises that no row has top-k,
    top-p or min-p, `adjusts` False that none has lists or counts; each saves a kernel. Only counts are changed beside
    `out` and the workspace.
    """
    num_lines, vocab = logits_LV.shape
    out = workspace.sampled(num_lines) if out is None else out
    w, p = workspace, parameters
    assert num_lines <= w.max_lines and vocab == w.vocab_size and logits_LV.stride(1) == 1
    assert rows_L.shape == out.ids_L.shape == (num_lines,)
    if not num_lines:
        return out
    stride, chunks = logits_LV.stride(0), triton.next_power_of_2(w.num_chunks)
    grid = (num_lines, w.num_chunks)
    kinds = {"ADJUST": adjusts}
    look_kernel[grid](logits_LV, rows_L, w.peaks, w.ids, w.sums, w.are_bad, vocab, w.num_chunks, stride)
    if adjusts:
        adjust_kernel[grid](
            state,
            logits_LV,
            rows_L,
            w.scores,
            p.floats,
            p.integers,
            num_tokens_R,
            w.changed_peaks,
            w.changed_ids,
            vocab,
            w.num_chunks,
            stride,
            stride_tokens,
            TILE=LIST_TILE,
            enable_fp_fusion=False,  # numpy rounds every product
        )
    row_state = (p.floats, p.integers)
    found = (w.peaks, w.ids, w.changed_peaks, w.changed_ids)
    sizes = (vocab, w.num_chunks, stride)
    weigh_kernel[grid](logits_LV, rows_L, w.scores, *row_state, *found, w.weights, *sizes, **kinds, CHUNKS=chunks)
    if filters:
        filter_kernel[(num_lines,)](
            logits_LV,
            rows_L,
            w.scores,
            *row_state,
            num_tokens_R,
            *found,
            w.are_bad,
            w.weights,
            w.listed,
            w.listed_ids,
            out.ids_L,
            *sizes,
            **kinds,
            CHUNKS=chunks,
            num_warps=8,
        )
    finish_kernel[(num_lines,)](
        logits_LV,
        rows_L,
        w.scores,
        *row_state,
        num_tokens_R,
        *found,
        w.sums,
        w.are_bad,
        w.weights,
        out.ids_L,
        out.log_probs_L,
        out.are_bad_L,
        *sizes,
        **kinds,
        FILTER=filters,
        CHUNKS=chunks,
    )
    return out


_LINES = {"logits": "*fp32", "rows": "*i32"}
_SIZES = dict.fromkeys(("vocab", "num_chunks", "stride_logits"), "i32")
_ROWS = {"floats": "*fp64", "integers": "*i64"}
_FOUND = {"peaks": "*fp32", "ids": "*i32"}
_CHANGED = {"scores": "*fp32", "changed_peaks": "*fp32", "changed_ids": "*i32"}
_DRAWN = {"num_tokens": "*i32", "are_bad": "*i32", "weights": "*i64", "drawn_ids": "*i32"}


def _builds(kind: str, *, adjusts: bool) -> tuple[KernelBuild, ...]:
    """The kernels that draw, for rows with lists and counts or for a batch without any."""
    signature = {**_LINES, **_ROWS, **_FOUND, **_SIZES, **_CHANGED}
    constants = {"ADJUST": adjusts, "CHUNKS": 32}
    weigh = KernelBuild(
        name=f"sampling_weigh_fp32{kind}",
        kernel=weigh_kernel,
        signature={**signature, "weights": "*i64"},
        constants=constants,
    )
    chosen = KernelBuild(
        name=f"sampling_filter_fp32{kind}",
        kernel=filter_kernel,
        signature={**signature, **_DRAWN, "listed": "*fp32", "listed_ids": "*i32"},
        constants=constants,
        num_warps=8,
    )
    finish = KernelBuild(
        name=f"sampling_finish_fp32{kind}",
        kernel=finish_kernel,
        signature={**signature, **_DRAWN, "sums": "*fp32", "log_probs": "*fp32", "bad": "*i1"},
        constants={**constants, "FILTER": True},
    )
    return weigh, chosen, finish


BUILDS = (
    KernelBuild(
        name="sampling_look_fp32",
        kernel=look_kernel,
        signature={**_LINES, **_FOUND, "sums": "*fp32", "are_bad": "*i32", **_SIZES},
    ),
    *_builds("", adjusts=False),
    *_builds("_adjusted", adjusts=True),
)
