"""DeviceRunner: one model on a GPU, whose rows live there: the host sends differences and gets ids.

Shapes: R rows, S rows that run, T packed tokens, L rows that sample, V vocabulary.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pageflight.core.plan import RowStart, StepPlan, StepResult
from pageflight.kernels.attention_decode import SplitWorkspace, choose_num_splits
from pageflight.kernels.sampling import Workspace, sample
from pageflight.kernels.step_inputs import append, prepare
from pageflight.lowering.device_blocks import DeviceInputs
from pageflight.lowering.device_model import DeviceModel
from pageflight.runners.base import RunnerLimits
from pageflight.runners.device_graphs import Graphs
from pageflight.runners.device_rows import DeviceRows, StagedStep
from pageflight.runners.local import COPIES_MEASURED, COPY_ROUNDS
from pageflight.sampling.adjustments import RowAdjustments
from pageflight.sampling.sampler import NonFiniteLogits, Sampler

Int32Array = NDArray[np.int32]
MAX_IN_FLIGHT = 2
WARM_LENGTHS = (1, 2, 4, 8, 16, 32, 64, 256)
"""Of chunks: the tiles of attention and of integer products go by powers of two."""
_NO_IDS = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class _Flight:
    """A step on its way: `results` int32 [3, L] on the host, there once `arrived` has happened; or logits that the
    host samples from, for rows whose wishes the device does not know."""

    plan: StepPlan
    epochs_L: Int32Array  # whose rows those were that sample
    results: Tensor | None = None
    arrived: torch.cuda.Event | None = None
    logits_LV: Tensor | None = None


class DeviceRunner:
    """Runs plans on a DeviceModel whose K/V blocks it allocates.

    Two steps may be in flight: ids that the device samples are tokens of their rows there at once, so the second needs
    nothing of the first from the host. Decode steps are captured as CUDA graphs per number of rows, lazily.
    """

    def __init__(
        self,
        model: DeviceModel,
        *,
        num_blocks: int,
        max_num_seqs: int,
        max_num_tokens: int,
        max_model_len: int,
        num_host_blocks: int = 0,
        uses_graphs: bool = True,
    ) -> None:
        model.blocks.allocate(num_blocks, num_host_blocks)
        device = model.device
        self.limits = RunnerLimits(
            num_blocks=num_blocks,
            num_host_blocks=num_host_blocks,
            host_copy_s=_measure_copies(model, min(num_blocks, num_host_blocks)),
            block_size=model.blocks.block_size,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            vocab_size=model.config.vocab_size,
            max_in_flight=MAX_IN_FLIGHT,
        )
        self._model, self._device = model, device
        self._rows = DeviceRows(
            max_num_seqs=max_num_seqs,
            max_num_tokens=max_num_tokens,
            max_model_len=max_model_len,
            block_size=model.blocks.block_size,
            device=device,
        )
        self._sampler = _HostSampler(max_num_seqs, max_model_len, model.config.vocab_size)
        self._filters_R = np.zeros(max_num_seqs, np.bool_)
        self._in_flight: deque[_Flight] = deque()
        self._workspace = Workspace(max_num_seqs, model.config.vocab_size, device, adjusts=False)
        self._splits: dict[int, SplitWorkspace | None] = {}
        self._num_sms = 0
        if device.type == "cuda":
            self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._graphs = Graphs(self._decode, max_num_seqs, device, is_used=uses_graphs)
        self._steps: torch.cuda.Stream | None = None  # the default stream would wait for all others
        self._copies: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._steps = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(device)  # what was made so far was made on the default stream

    def warm_up(self, max_num_tokens: int) -> None:
        """Compile what steps launch, on rows that nobody holds: a stream would wait seconds for it later."""
        with torch.cuda.stream(self._steps):
            lengths = {length for length in WARM_LENGTHS if length < max_num_tokens} | {max_num_tokens}
            for filters in (False, True):
                for size in sorted({1, self._graphs.bucket_of(2), self._graphs.bucket_of(self.limits.max_num_seqs)}):
                    self._decode(self._rows.stage_decode(_NO_IDS, _NO_IDS, size), filters)
                for length in sorted(lengths):
                    plan = _padding(length)
                    staged = self._rows.stage_mixed(plan, length)
                    self._sample(self._forward_mixed(plan, staged), staged.sample_rows_L, filters=filters)

    def submit(self, plan: StepPlan) -> None:
        """Apply the plan's differences and begin its forward pass; a plan without rows changes state only."""
        with torch.cuda.stream(self._steps):
            self._submit(plan)

    def _submit(self, plan: StepPlan) -> None:
        assert len(self._in_flight) < MAX_IN_FLIGHT, "collect() comes before a third submit()"
        if self._in_flight and self._in_flight[-1].logits_LV is not None:
            self._in_flight[-1] = self._sampled_by_host(self._in_flight[-1])  # its ids are this plan's tokens
        for row in plan.ended_rows:
            self._sampler.end(row)
        for start in plan.starts:
            self._sampler.start(start)
            sampling = start.sampling
            self._filters_R[start.row] = sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0
        self._rows.change(plan)
        self._copy_blocks(plan)
        epochs_L = self._sampler.epochs_of(plan.rows[plan.samples])
        if not plan.rows.size:
            self._rows.flush()
            flight = _Flight(plan, epochs_L)
        elif self._sampler.knows_more(plan.rows[plan.samples]):
            logits_LV = self._forward_mixed(plan, self._rows.stage_mixed(plan, plan.num_tokens))
            flight = _Flight(plan, epochs_L, logits_LV=logits_LV)
        else:
            flight = _Flight(plan, epochs_L, *self._fetched(self._begin(plan)))
        self._in_flight.append(flight)

    def _begin(self, plan: StepPlan) -> Tensor | None:
        """Results of a step whose ids the device samples; None where no row samples."""
        filters = bool(self._filters_R[plan.rows[plan.samples]].any())
        if plan.num_tokens == plan.rows.size and plan.samples.all():
            bucket = self._graphs.bucket_of(plan.rows.size)
            staged = self._rows.stage_decode(plan.rows, plan.starts_at, bucket)
            return self._graphs.run(staged, filters=filters)
        staged = self._rows.stage_mixed(plan, plan.num_tokens)
        logits_LV = self._forward_mixed(plan, staged)
        return self._sample(logits_LV, staged.sample_rows_L, filters=filters) if len(logits_LV) else None

    def collect(self) -> StepResult:
        """Wait for the oldest submitted plan and return its ids; rows whose logits are not finite are `broken`."""
        assert self._in_flight, "submit() comes before collect()"
        flight = self._in_flight.popleft()
        if flight.logits_LV is not None:
            with torch.cuda.stream(self._steps):
                flight = self._sampled_by_host(flight)
        plan = flight.plan
        if flight.results is None:
            return StepResult(plan.step, _NO_IDS)
        if flight.arrived is not None:
            flight.arrived.synchronize()
        rows_L = plan.rows[plan.samples]
        ids_L, log_prob_bits_L, are_bad_L = flight.results[:, : rows_L.size].numpy()
        broken_L = are_bad_L.astype(np.bool_)
        self._sampler.note(rows_L, flight.epochs_L, (plan.starts_at + plan.lengths)[plan.samples], ids_L)
        log_probs_L = self._sampler.asked_log_probs(rows_L, log_prob_bits_L.view(np.float32))
        return StepResult(plan.step, ids_L, log_probs_L, broken_L if broken_L.any() else None)

    def close(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._graphs.close()
        self._model.close()

    # --- passes

    def _decode(self, staged: StagedStep, filters: bool) -> Tensor:
        """One token for every row, from its row to its result; what a graph captures."""
        bucket = len(staged.rows_S)
        ids, positions, slots, lens = (self._integers(bucket) for _ in range(4))
        self._prepare(staged, ids, positions, slots, lens)
        inputs = DeviceInputs(
            ids_T=ids,
            positions_T=positions,
            slots_T=slots,
            tables_SM=self._tables(staged.rows_S),
            lens_S=lens,
            workspace=self._splits_of(bucket),
        )
        return self._sample(self._model.forward(inputs), staged.sample_rows_L, filters=filters)

    def _forward_mixed(self, plan: StepPlan, staged: StagedStep) -> Tensor:
        ids, positions, slots = (self._integers(plan.num_tokens) for _ in range(3))
        self._prepare(staged, ids, positions, slots, None)
        inputs = DeviceInputs(
            ids_T=ids,
            positions_T=positions,
            slots_T=slots,
            tables_SM=self._tables(staged.rows_S),
            token_begins=staged.token_begins,
            past_lens_S=staged.starts_S,
            max_query_len=int(plan.lengths.max()),
            take_L=staged.take_L,
        )
        return self._model.forward(inputs)

    def _integers(self, count: int) -> Tensor:
        """One tensor for each purpose: engines and kernels want them to begin at round addresses."""
        return torch.empty(count, dtype=torch.int32, device=self._device)

    def _prepare(self, staged: StagedStep, ids: Tensor, positions: Tensor, slots: Tensor, lens: Tensor | None) -> None:
        rows = self._rows
        prepare(
            rows.state,
            rows.num_tokens_R,
            staged.rows_S,
            staged.starts_S,
            ids_T=ids,
            positions_T=positions,
            slots_T=slots,
            lens_S=lens,
            token_begins=staged.token_begins,
            sequences_T=staged.sequences_T,
            stride_tokens=rows.stride_tokens,
            tables_at=rows.tables_at,
            stride_tables=rows.stride_tables,
            block_size=rows.block_size,
        )

    def _tables(self, rows_S: Tensor) -> Tensor:
        return self._rows.tables_RB.index_select(0, rows_S.clamp_min(0))

    def _sample(self, logits_LV: Tensor, rows_L: Tensor, *, filters: bool) -> Tensor:
        """Choose ids, make them tokens of their rows, and return what the host wants to know: int32 [3, L]."""
        rows = self._rows
        sampled = sample(logits_LV, rows_L, rows.num_tokens_R, rows.parameters, self._workspace, filters=filters)
        results = torch.empty(3, len(rows_L), dtype=torch.int32, device=self._device)
        append(
            rows.state,
            rows.num_tokens_R,
            rows_L,
            sampled.ids_L,
            sampled.log_probs_L,
            sampled.are_bad_L,
            results,
            stride_tokens=rows.stride_tokens,
        )
        return results

    def _fetched(self, results: Tensor | None) -> tuple[Tensor | None, torch.cuda.Event | None]:
        """Results on their way to the host, on a stream of their own: the next step need not wait for them."""
        if results is None or self._copies is None:
            return (None if results is None else results.clone()), None
        kept = results.clone()  # a captured graph writes to the same place again
        on_host = torch.empty(kept.shape, dtype=torch.int32, pin_memory=True)
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            on_host.copy_(kept, non_blocking=True)
            kept.record_stream(self._copies)
            arrived = self._copies.record_event()
        return on_host, arrived

    def _sampled_by_host(self, flight: _Flight) -> _Flight:
        """Ids of rows with wishes that only the host's sampler knows; they reach the device with the next step."""
        plan = flight.plan
        assert flight.logits_LV is not None
        rows_L = plan.rows[plan.samples]
        ids_L, log_probs_L, are_bad_L = self._sampler.sample(flight.logits_LV.float().cpu().numpy(), rows_L)
        self._rows.put(rows_L, (plan.starts_at + plan.lengths)[plan.samples], ids_L)
        results = np.stack([ids_L, log_probs_L.view(np.int32), are_bad_L.astype(np.int32)])
        return _Flight(plan, flight.epochs_L, torch.from_numpy(results))

    def _copy_blocks(self, plan: StepPlan) -> None:
        if plan.copy_out_blocks is not None and plan.copy_out_slots is not None:
            self._model.blocks.copy_out(self._on_device(plan.copy_out_blocks), _index(plan.copy_out_slots))
        if plan.copy_in_slots is not None and plan.copy_in_blocks is not None:
            self._model.blocks.copy_in(_index(plan.copy_in_slots), self._on_device(plan.copy_in_blocks))
        if plan.copy_sources is not None and plan.copy_targets is not None and plan.copy_sources.size:
            self._model.blocks.copy(self._on_device(plan.copy_sources), self._on_device(plan.copy_targets))

    def _on_device(self, ids: Int32Array) -> Tensor:
        on_host = torch.from_numpy(np.ascontiguousarray(ids, np.int32))
        if self._device.type == "cuda":  # from other memory the copy would wait for the steps in flight
            on_host = on_host.pin_memory()
        return on_host.to(self._device, non_blocking=True)

    def _splits_of(self, num_rows: int) -> SplitWorkspace | None:
        """The workspace for decoding so many rows, made once; None where no context is split."""
        if num_rows not in self._splits:
            config = self._model.config
            longest = self.limits.max_model_len
            num_splits = choose_num_splits(num_rows, config.num_kv_heads, longest, self._num_sms)
            self._splits[num_rows] = None
            if num_splits > 1:
                sizes = (num_rows, config.num_heads, num_splits, config.head_dim)
                self._splits[num_rows] = SplitWorkspace.empty(*sizes, self._device)
        return self._splits[num_rows]


class _HostSampler:
    """The numpy sampler with the tokens that it needs, for rows whose wishes the device does not know."""

    def __init__(self, max_num_seqs: int, max_model_len: int, vocab_size: int) -> None:
        self._sampler = Sampler(max_num_seqs=max_num_seqs, vocab_size=vocab_size)
        self._tokens_RM = np.zeros((max_num_seqs, max_model_len), np.int32)
        self._num_tokens_R = np.zeros(max_num_seqs, np.int32)
        self._epochs_R = np.zeros(max_num_seqs, np.int32)
        self._knows_more_R = np.zeros(max_num_seqs, np.bool_)
        self._log_probs_R = np.zeros(max_num_seqs, np.bool_)

    def start(self, start: RowStart) -> None:
        row, num_tokens = start.row, start.token_ids.size
        self._sampler.start(start)
        self._tokens_RM[row, :num_tokens], self._num_tokens_R[row] = start.token_ids, num_tokens
        self._epochs_R[row] += 1
        self._knows_more_R[row] = RowAdjustments.needed(start.sampling)
        self._log_probs_R[row] = start.sampling.log_probs

    def end(self, row: int) -> None:
        self._sampler.end(row)
        self._knows_more_R[row] = self._log_probs_R[row] = False

    def knows_more(self, rows_L: Int32Array) -> bool:
        return bool(self._knows_more_R[rows_L].any())

    def epochs_of(self, rows_L: Int32Array) -> Int32Array:
        """Tells who holds a row from who held it before."""
        return self._epochs_R[rows_L]

    def note(self, rows_L: Int32Array, epochs_L: Int32Array, positions_L: Int32Array, ids_L: Int32Array) -> None:
        """Ids that became tokens of their rows, but of those that somebody else has taken meanwhile."""
        current = (self._epochs_R[rows_L] == epochs_L) & (positions_L < self._tokens_RM.shape[1])
        rows, positions = rows_L[current], positions_L[current]
        self._tokens_RM[rows, positions] = ids_L[current]
        self._num_tokens_R[rows] = positions + 1

    def asked_log_probs(self, rows_L: Int32Array, log_probs_L: NDArray[np.float32]) -> NDArray[np.float32] | None:
        asked_L = self._log_probs_R[rows_L]
        return np.where(asked_L, log_probs_L, np.float32(np.nan)) if asked_L.any() else None

    def sample(
        self, logits_LV: NDArray[np.float32], rows_L: Int32Array
    ) -> tuple[Int32Array, NDArray[np.float32], NDArray[np.bool_]]:
        """Ids, log probabilities (NaN where nobody asked) and lines that are not finite."""
        ids_L, log_probs_L = np.zeros(rows_L.size, np.int32), np.full(rows_L.size, np.nan, np.float32)
        sound_L = np.ones(rows_L.size, np.bool_)
        while sound_L.any():
            try:
                ids, log_probs = self._sampler.sample(
                    logits_LV[sound_L], rows_L[sound_L], self._tokens_RM, self._num_tokens_R
                )
            except NonFiniteLogits as error:
                sound_L &= ~np.isin(rows_L, error.rows)
                continue
            ids_L[sound_L] = ids
            if log_probs is not None:
                log_probs_L[sound_L] = log_probs
            break
        return ids_L, log_probs_L, ~sound_L


def _padding(num_tokens: int) -> StepPlan:
    """A step that nobody has: it writes nowhere."""
    return StepPlan(
        step=-1,
        rows=np.full(1, -1, np.int32),
        starts_at=np.zeros(1, np.int32),
        lengths=np.full(1, num_tokens, np.int32),
        samples=np.ones(1, np.bool_),
    )


def _measure_copies(model: DeviceModel, num_blocks: int) -> float:
    """Seconds of copying one block to the host or back, of a few at once, as a swap copies them."""
    if not num_blocks:
        return 0.0
    slots = torch.arange(min(num_blocks, COPIES_MEASURED))
    blocks = slots.to(device=model.device, dtype=torch.int32)
    times = []
    for _ in range(COPY_ROUNDS):
        begin_s = time.perf_counter()
        model.blocks.copy_out(blocks, slots)  # waits for the device
        model.blocks.copy_in(slots, blocks)
        model.blocks.copy_out(blocks[:1], slots[:1])
        times.append(time.perf_counter() - begin_s)
    return statistics.median(times[1:]) / (2 * len(slots) + 1)


def _index(ids: Int32Array) -> Tensor:
    return torch.from_numpy(ids.astype(np.int64))
