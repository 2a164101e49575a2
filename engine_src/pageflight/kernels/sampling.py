"""Sampling on the device, without the host waiting for anything: the ids that `sampling.Sampler` would choose.

L lines of logits, R rows of the batch (line l belongs to row rows_L[l]; -1: to none), V vocabulary, A listed ids of a
row, C chunks of a line.

An id is drawn as on the host: by Philox's number for (seed, sequence, position) from the cumulative weights in the
order of ids. Both give the same id unless a float32 exponential, rounded differently, moves a border past the number.
Every row has its own parameters, so one launch serves greedy rows and all others; grids depend on shapes alone.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: SIM102

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pageflight.core.request import SamplingParams
from pageflight.kernels.builds import KernelBuild
from pageflight.kernels.sampling_filter import LIST_SIZE, filter_kernel
from pageflight.kernels.sampling_rows import (
    CHUNK,
    INFINITY,
    distances,
    greatest,
    has_penalties,
    is_filtered,
    is_greedy,
    load_scores,
    peak_of,
    target_of,
    temperature_of,
    uniform_of,
    whole,
)
from pageflight.kernels.sampling_scan import adjust_kernel, look_kernel, weigh_kernel


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowParameters:
    """What the rows asked for, on the device; `packed` gives the lines to copy into it when a row starts.

    `floats`: float64 [R, 6], `integers`: int64 [R, 4]. `listed_ids` int32 and `listed_values` float32 [R, A]: ids whose
    logit gets a value added, -inf to forbid them; no id twice in a row. `counts`: int32 [R, V], 1 for ids of the prompt
    plus 2 for each time in the output, of rows with penalties; sampling keeps them. None: no row has any such.
    """

    floats: Tensor
    integers: Tensor
    listed_ids: Tensor | None = None
    listed_values: Tensor | None = None
    counts: Tensor | None = None

    @staticmethod
    def empty(
        num_rows: int, vocab_size: int, device: torch.device | str, *, num_listed: int = 0, penalties: bool = False
    ) -> RowParameters:
        """Parameters of greedy rows, with room for `num_listed` ids each and for counts if there may be `penalties`."""
        floats, integers = packed(SamplingParams())
        listed = (num_rows, num_listed)
        return RowParameters(
            floats=floats.repeat(num_rows, 1).to(device),
            integers=integers.repeat(num_rows, 1).to(device),
            listed_ids=torch.full(listed, -1, dtype=torch.int32, device=device) if num_listed else None,
            listed_values=torch.zeros(listed, device=device) if num_listed else None,
            counts=torch.zeros(num_rows, vocab_size, dtype=torch.int32, device=device) if penalties else None,
        )


def packed(sampling: SamplingParams, sequence_index: int = 0, num_listed: int = 0) -> tuple[Tensor, Tensor]:
    """The lines of a row in `floats` and `integers`, on the CPU. `num_listed`: how many of its listed ids count."""
    seed = sampling.seed & 0xFFFF_FFFF_FFFF_FFFF
    floats = (
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
    )
    integers = (sampling.top_k, seed - (seed >> 63 << 64), sequence_index, num_listed)
    return torch.tensor(floats, dtype=torch.float64), torch.tensor(integers, dtype=torch.int64)


def start_counts(counts_V: Tensor, token_ids: Tensor, num_prompt: int) -> None:
    """Fill a row's line of `counts` from its prompt and the output that it brings, int64 ids on the same device."""
    counts_V.zero_()
    output = token_ids[num_prompt:]
    counts_V.index_add_(0, output, torch.full_like(output, 2, dtype=counts_V.dtype))
    prompt = token_ids[:num_prompt]
    counts_V[prompt] = counts_V[prompt] | 1


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

    def __init__(self, max_lines: int, vocab_size: int, device: torch.device | str, *, adjusts: bool = True) -> None:
        """`adjusts` False leaves out the scores [L, V], for rows without penalties and lists."""

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.max_lines, self.vocab_size = max_lines, vocab_size
        self.num_chunks = triton.cdiv(vocab_size, CHUNK.value)
        shape = (max_lines, self.num_chunks)
        self.peaks, self.sums, self.changed_peaks = new(*shape), new(*shape), new(*shape)
        self.ids, self.changed_ids, self.are_bad = (new(*shape, dtype=torch.int32) for _ in range(3))
        self.weights = new(*shape, dtype=torch.int64)
        self.scores = new(max_lines, vocab_size) if adjusts else None
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
    counts,
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
    stride_counts,
    PENALISE: tl.constexpr,
    LIST: tl.constexpr,
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
            scores_line = scores + line.to(tl.int64) * vocab if PENALISE or LIST else None
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
    if PENALISE:
        if has_penalties(floats, row) & (not is_bad):
            place = counts + row * stride_counts + drawn
            tl.store(place, tl.load(place) + 2)


def sample(
    logits_LV: Tensor,
    rows_L: Tensor,
    num_tokens_R: Tensor,
    parameters: RowParameters,
    workspace: Workspace,
    *,
    filters: bool = True,
    out: Sampled | None = None,
) -> Sampled:
    """The next id of each line. `logits_LV`: float32, fp16 or bf16, only read; `rows_L` int32, no row twice.

    `num_tokens_R` int32: tokens of each row's prompt and output so far, the position that its random number belongs to.
    Penalties and lists apply where `parameters` has them. `filters` False promises that no row has top-k, top-p or
    min-p, and saves their kernel.
    """
    num_lines, vocab = logits_LV.shape
    out = workspace.sampled(num_lines) if out is None else out
    w, p = workspace, parameters
    penalise, lists = p.counts is not None, p.listed_ids is not None
    assert num_lines <= w.max_lines and vocab == w.vocab_size and logits_LV.stride(1) == 1
    assert rows_L.shape == out.ids_L.shape == (num_lines,)
    assert w.scores is not None or not (penalise or lists), "this workspace has no room for adjusted scores"
    if not num_lines:
        return out
    stride, chunks = logits_LV.stride(0), triton.next_power_of_2(w.num_chunks)
    grid = (num_lines, w.num_chunks)
    kinds = {"PENALISE": penalise, "LIST": lists}
    look_kernel[grid](logits_LV, rows_L, w.peaks, w.ids, w.sums, w.are_bad, vocab, w.num_chunks, stride)
    if penalise or lists:
        adjust_kernel[grid](
            logits_LV,
            rows_L,
            w.scores,
            p.counts,
            p.listed_ids,
            p.listed_values,
            p.floats,
            p.integers,
            w.changed_peaks,
            w.changed_ids,
            vocab,
            w.num_chunks,
            stride,
            0 if p.counts is None else p.counts.stride(0),
            0 if p.listed_ids is None else p.listed_ids.stride(0),
            **kinds,
            LIST_TILE=128,
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
        p.counts,
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
        0 if p.counts is None else p.counts.stride(0),
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
_COUNTS = {"counts": "*i32", "stride_counts": "i32"}
_LISTED = {"listed_ids": "*i32", "listed_values": "*fp32", "stride_listed": "i32"}
_DRAWN = {"num_tokens": "*i32", "are_bad": "*i32", "weights": "*i64", "drawn_ids": "*i32"}


def _builds(kind: str, *, adjusts: bool) -> tuple[KernelBuild, ...]:
    """The kernels that draw, for rows with penalties and lists or for a batch without any."""
    signature = {**_LINES, **_ROWS, **_FOUND, **_SIZES, **(_CHANGED if adjusts else {})}
    constants = {"PENALISE": adjusts, "LIST": adjusts, "CHUNKS": 32, **({} if adjusts else dict.fromkeys(_CHANGED))}
    counts = {"stride_counts": "i32", **({"counts": "*i32"} if adjusts else {})}
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
        signature={**signature, **counts, **_DRAWN, "sums": "*fp32", "log_probs": "*fp32", "bad": "*i1"},
        constants={**constants, "FILTER": True, **({} if adjusts else {"counts": None})},
    )
    return weigh, chosen, finish


BUILDS = (
    KernelBuild(
        name="sampling_look_fp32",
        kernel=look_kernel,
        signature={**_LINES, **_FOUND, "sums": "*fp32", "are_bad": "*i32", **_SIZES},
    ),
    KernelBuild(
        name="sampling_adjust_fp32",
        kernel=adjust_kernel,
        signature={**_LINES, "scores": "*fp32", **_COUNTS, **_LISTED, **_ROWS, **_FOUND, **_SIZES},
        constants={"PENALISE": True, "LIST": True, "LIST_TILE": 128},
    ),
    *_builds("", adjusts=False),
    *_builds("_adjusted", adjusts=True),
)
