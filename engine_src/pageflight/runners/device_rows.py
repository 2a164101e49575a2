"""Rows of the batch on the device, kept up by one copy and one launch a step.

Shapes: R rows, P most tokens of a row, B most blocks of a row; S rows that run, T packed tokens, L rows that sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pageflight.core.plan import RowStart, StepPlan
from pageflight.kernels.sampling import RowParameters
from pageflight.kernels.step_inputs import fill, scatter
from pageflight.lowering.device_blocks import LONG_CONTEXT
from pageflight.runners.device_wishes import Wishes

Int32Array = NDArray[np.int32]
ROUND = 64  # words, 256 bytes: what TensorRT asks of addresses, and kernels are compiled for
MAX_CHANGES = 1 << 16  # words changed by one launch
RUNS_OF_A_START = 3  # its tokens, and two lines of parameters
_NO_WORDS = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class StagedStep:
    """Where the device finds what a step runs: views of one buffer, int32."""

    rows_S: Tensor  # padded with -1
    starts_S: Tensor
    sample_rows_L: Tensor  # padded with -1
    token_begins: Tensor | None = None  # [S + 1]
    sequences_T: Tensor | None = None
    take_L: Tensor | None = None
    long_lens_S: Tensor | None = None  # of rows that decode behind more than `LONG_CONTEXT` keys; None: no such row


class DeviceRows:
    """Tokens, block tables and sampling parameters of all rows, in one int32 tensor."""

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_tokens: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
        num_passes: int = 2,
    ) -> None:
        """`max_num_tokens`: the most that a pass has. `num_passes`: as many may be in flight."""
        self.stride_tokens, self.block_size = max_model_len, block_size
        self.stride_tables = -(-max_model_len // block_size)
        num_tokens, num_tables = max_num_seqs * self.stride_tokens, max_num_seqs * self.stride_tables
        self.tables_at = num_tokens
        floats, integers = packed_rows(max_num_seqs)
        floats_at = (num_tokens + num_tables + 1) // 2 * 2  # eight-byte words begin at even ones
        integers_at = floats_at + floats.size
        assert integers_at + integers.size < 2**31, "words are numbered in 32 bits"
        self.state = torch.zeros(integers_at + integers.size, dtype=torch.int32, device=device)
        self.state[floats_at:] = torch.from_numpy(np.concatenate([floats, integers])).to(device)
        self.tables_RB = self.state[num_tokens : num_tokens + num_tables].view(max_num_seqs, self.stride_tables)
        self.parameters = RowParameters(
            floats=self.state[floats_at:integers_at].view(torch.float64).view(max_num_seqs, -1),
            integers=self.state[integers_at:].view(torch.int64).view(max_num_seqs, -1),
        )
        self._parameters_at = ((floats_at, floats.size // max_num_seqs), (integers_at, integers.size // max_num_seqs))
        self.num_tokens_R = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self._starts_at = _rounded(max_num_seqs)
        num_staged = 6 * max_num_seqs + 1 + max_num_tokens
        num_changes = 2 * MAX_CHANGES + 2 * RUNS_OF_A_START * max_num_seqs + 1 + MAX_CHANGES
        self._staging = _Staging(13 * ROUND + num_staged + num_changes, num_passes + 1, device)
        self._pairs: list[tuple[Int32Array, Int32Array]] = []  # words and values for the next launch
        self._runs: dict[int, Int32Array] = {}  # where consecutive words begin, and their values

    def change(self, plan: StepPlan, wishes: Sequence[Wishes]) -> None:
        """Rows that start, with their wishes, and block tables that change; the next `stage` takes them over."""
        for start, wished in zip(plan.starts, wishes, strict=True):
            self._start(start, wished)
        if plan.table_rows is not None and plan.table_columns is not None and plan.table_blocks is not None:
            words = self.tables_at + plan.table_rows.astype(np.int64) * self.stride_tables + plan.table_columns
            self._pairs.append((words.astype(np.int32), plan.table_blocks.astype(np.int32)))

    def _start(self, start: RowStart, wishes: Wishes) -> None:
        row, num_tokens = start.row, start.token_ids.size
        assert 0 < num_tokens <= self.stride_tokens, "a sequence starts with at least one token and fits its row"
        self._runs[row * self.stride_tokens] = start.token_ids.astype(np.int32)
        for (at, size), line in zip(self._parameters_at, (wishes.floats, wishes.integers), strict=True):
            self._runs[at + row * size] = line

    def stage_decode(self, rows_S: Int32Array, starts_S: Int32Array, bucket: int) -> StagedStep:
        """A step of one token for every row, filled up with padding to `bucket` rows."""
        rows = np.full(bucket, -1, np.int32)
        starts = np.zeros(bucket, np.int32)
        rows[: len(rows_S)], starts[: len(starts_S)] = rows_S, starts_S
        # Rows of padding run as well as sample: both read the same place, which a captured graph knows.
        on_rows, on_starts = self._stage((rows, starts), places=(0, self._starts_at))
        return StagedStep(rows_S=on_rows, starts_S=on_starts, sample_rows_L=on_rows)

    def stage_mixed(self, plan: StepPlan, num_tokens: int) -> StagedStep:
        """A step with chunks, exactly as planned."""
        begins = np.zeros(plan.rows.size + 1, np.int32)
        np.cumsum(plan.lengths, out=begins[1:])
        is_long = (plan.lengths == 1) & (plan.starts_at >= LONG_CONTEXT)
        parts = (
            plan.rows,
            plan.starts_at.astype(np.int32),
            begins,
            plan.rows[plan.samples],
            (begins[1:] - 1)[plan.samples],
            np.repeat(np.arange(plan.rows.size, dtype=np.int32), plan.lengths),
            np.where(is_long, plan.starts_at + 1, 0).astype(np.int32),
        )
        rows, starts, token_begins, sample_rows, take, sequences, long_lens = self._stage(parts)
        assert len(sequences) == num_tokens
        has_long = bool(is_long.any())
        return StagedStep(rows, starts, sample_rows, token_begins, sequences, take, long_lens if has_long else None)

    def warm_up(self) -> None:
        """Launch what applies changes, while no row is held."""
        self._pairs.append((np.ones(1, np.int32), np.zeros(1, np.int32)))
        self._runs[0] = np.zeros(1, np.int32)
        self.flush()

    def flush(self) -> None:
        """What has changed reaches the device without a step."""
        self._stage(())

    def _stage(self, parts: Sequence[Int32Array], places: Sequence[int] | None = None) -> list[Tensor]:
        """Copy `parts` and the pending changes over, apply these, and return where the parts lie."""
        words, values = self._take_pairs()
        *earlier, runs = self._take_runs()
        for some in earlier:
            self._send((), None, _NO_WORDS, _NO_WORDS, some)
        while words.size > MAX_CHANGES:
            self._send((), None, words[:MAX_CHANGES], values[:MAX_CHANGES], [])
            words, values = words[MAX_CHANGES:], values[MAX_CHANGES:]
        return self._send(parts, places, words, values, runs)

    def _send(
        self,
        parts: Sequence[Int32Array],
        places: Sequence[int] | None,
        words: Int32Array,
        values: Int32Array,
        runs: Sequence[tuple[int, Int32Array]],
    ) -> list[Tensor]:
        begins = np.array([begin for begin, _ in runs], np.int32)
        lengths = np.array([run.size for _, run in runs], np.int32)
        offsets = np.zeros(len(runs) + 1, np.int32)
        np.cumsum(lengths, out=offsets[1:])
        filled = np.concatenate([run for _, run in runs]) if runs else _NO_WORDS
        changes = (words, values, begins, offsets, filled)
        *on_parts, on_words, on_values, on_begins, on_offsets, on_filled = self._staging.send(
            (*parts, *changes), places
        )
        scatter(self.state, on_words, on_values)
        fill(self.state, on_begins, on_offsets, on_filled, int(lengths.max(initial=0)))
        return on_parts

    def _take_pairs(self) -> tuple[Int32Array, Int32Array]:
        pairs, self._pairs = self._pairs, []
        if not pairs:
            return _NO_WORDS, _NO_WORDS
        words, values = (np.concatenate(part) for part in zip(*pairs, strict=True))
        return words, values

    def _take_runs(self) -> Iterator[list[tuple[int, Int32Array]]]:
        """Runs in batches of at most `MAX_CHANGES` values; the last one may be empty."""
        pending, self._runs = self._runs, {}
        batch: list[tuple[int, Int32Array]] = []
        room = MAX_CHANGES
        for begin, run in pending.items():
            at = 0
            while at < run.size:
                if not room:
                    yield batch
                    batch, room = [], MAX_CHANGES
                part = run[at : at + room]
                batch.append((begin + at, part))
                at, room = at + part.size, room - part.size
        yield batch


class _Staging:
    """Buffers in rotation on the host, where one is filled while the others travel or are read; one on the device."""

    def __init__(self, num_words: int, num_buffers: int, device: torch.device) -> None:
        is_gpu = device.type == "cuda"
        self._device = torch.zeros(num_words, dtype=torch.int32, device=device)
        self._host = [torch.zeros(num_words, dtype=torch.int32, pin_memory=is_gpu) for _ in range(num_buffers)]
        self._sent: list[torch.cuda.Event | None] = [None] * num_buffers
        if is_gpu:
            self._sent = [torch.cuda.Event() for _ in range(num_buffers)]  # type: ignore[no-untyped-call]
        self._next = 0

    def send(self, parts: Sequence[Int32Array], places: Sequence[int] | None) -> list[Tensor]:
        """One copy of all parts, one after another, the first ones at `places` where given; where they lie then."""
        begins, at = [], 0
        for index, part in enumerate(parts):
            at = places[index] if places is not None and index < len(places) else _rounded(at)
            begins.append(at)
            at += part.size
        assert at <= len(self._device), f"a step of {at} words, room for {len(self._device)}"
        host, sent = self._host[self._next], self._sent[self._next]
        if sent is not None:
            sent.synchronize()  # the last copy out of it
        filled = host.numpy()
        for begin, part in zip(begins, parts, strict=True):
            filled[begin : begin + part.size] = part
        self._device[:at].copy_(host[:at], non_blocking=True)
        if sent is not None:
            sent.record()
        self._next = (self._next + 1) % len(self._host)
        return [self._device[begin : begin + part.size] for begin, part in zip(begins, parts, strict=True)]


def _rounded(num_words: int) -> int:
    return -(-num_words // ROUND) * ROUND


def rows_bytes(max_num_seqs: int, max_model_len: int, block_size: int) -> int:
    """Memory of tokens and block tables: four bytes for each of them."""
    return 4 * max_num_seqs * (max_model_len + -(-max_model_len // block_size))


def packed_rows(num_rows: int) -> tuple[Int32Array, Int32Array]:
    """Words of the sampling parameters of greedy rows: floats of all rows, then integers of all rows."""
    parameters = RowParameters.empty(num_rows, "cpu")
    return parameters.floats.numpy().view(np.int32).ravel(), parameters.integers.numpy().view(np.int32).ravel()
