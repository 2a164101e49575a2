"""DeviceRunner: one model on a GPU, whose rows live there: the host sends differences and gets ids.

Shapes: R rows, S rows that run, T packed tokens, L rows that sample, V vocabulary.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pageflight.core.errors import OutOfMemory
from pageflight.core.plan import StepPlan, StepResult
from pageflight.kernels.attention_decode import SplitWorkspace, default_tiles
from pageflight.kernels.attention_tuning import measured_tiles
from pageflight.kernels.sampling import Workspace, sample
from pageflight.kernels.step_inputs import append, prepare
from pageflight.kernels.tuning import AttentionTiles
from pageflight.lowering.device_blocks import LONG_CONTEXT, DeviceInputs, first_line, is_shortage
from pageflight.lowering.device_model import DeviceModel
from pageflight.runners.base import RunnerLimits
from pageflight.runners.device_graphs import RUNS_BEFORE, Graphs
from pageflight.runners.device_rows import DeviceRows, StagedStep
from pageflight.runners.device_wishes import RowWishes, copied
from pageflight.runners.local import COPIES_MEASURED, COPY_ROUNDS

log = logging.getLogger(__name__)

T = TypeVar("T")
Int32Array = NDArray[np.int32]
MAX_IN_FLIGHT = 2
_NO_IDS = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Results:
    """Of a pass, on their way: int32 [3, L] on the host, there once `arrived` has happened, copied from `kept`.
    `lines`: which of the step's they are."""

    lines: Int32Array
    on_host: Tensor
    kept: Tensor
    arrived: torch.cuda.Event | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """A step on its way. `log_probs_L`: who asked for them."""

    plan: StepPlan
    log_probs_L: NDArray[np.bool_]
    results: list[Results] = field(default_factory=list)


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
        is_alone: bool = True,
        num_passes: int = MAX_IN_FLIGHT,
    ) -> None:
        """`is_alone` False for one of several ranks, whose passes are sums with the others: it repeats none.
        `num_passes`: as many may be in flight, parts of `MAX_IN_FLIGHT` steps."""
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
        self._model, self._device, self._is_alone = model, device, is_alone
        self._rows = DeviceRows(
            max_num_seqs=max_num_seqs,
            max_num_tokens=max_num_tokens,
            max_model_len=max_model_len,
            block_size=model.blocks.block_size,
            device=device,
            num_passes=num_passes,
        )
        self._hidden = model.hidden(max_num_tokens)
        self.num_shortages = 0
        """How often memory did not suffice and was found."""
        self._wishes = RowWishes(max_num_seqs, model.config.vocab_size, device, samples=model.stage.is_last)
        self._in_flight: deque[Flight] = deque()
        self._workspace = Workspace(max_num_seqs, model.config.vocab_size, device) if model.stage.is_last else None
        self._splits: dict[int, tuple[SplitWorkspace | None, AttentionTiles]] = {}
        self._num_sms = 0
        if device.type == "cuda":
            self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._graphs = Graphs(self._decode, max_num_seqs, device, is_used=uses_graphs, is_capturable=model.can_capture)
        self._steps: torch.cuda.Stream | None = None  # the default stream would wait for all others
        self._copies: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._steps = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(device)  # what was made so far was made on the default stream

    def warm_up(self, max_num_tokens: int) -> None:
        """Compile what steps launch, on rows that nobody holds: a stream would wait seconds for it later.

        Tiles go by powers of two of tokens and of rows; where the model prepares each size, all decode steps run.
        """
        sizes = {1, *self._graphs.sizes}
        if not self._model.prepares_sizes:
            sizes &= {self._graphs.bucket_of(rows) for rows in _up_to(self.limits.max_num_seqs)}
        with torch.cuda.stream(self._steps):
            self._rows.warm_up()
            nothing = copied(np.full(1, -1, np.int32), self._device)
            self._model.blocks.copy(nothing, nothing)
            for size in sorted(sizes):
                self._decode(self._rows.stage_decode(_NO_IDS, _NO_IDS, size), False, False)
            for length in _up_to(max_num_tokens):
                self._warm_up_mixed(self._padding(length))
            if self.limits.max_model_len > LONG_CONTEXT:
                for size in sorted(sizes):
                    self._warm_up_mixed(_padding([1] * size, starts_at=LONG_CONTEXT))
            for filters, adjusts in product((False, True), repeat=2):
                self._decode(self._rows.stage_decode(_NO_IDS, _NO_IDS, 1), filters, adjusts)

    def capture_all(self, *, filters: bool = False, adjusts: bool = False) -> None:
        """Run decode steps of every size, on rows that nobody holds, until they are captured: for measurements.

        `filters`, `adjusts`: of which kind, see `RowWishes.kinds_of`. Sizes that memory was taken from wait longer.
        """
        with torch.cuda.stream(self._steps):
            for size, _ in product(self._graphs.sizes, range(RUNS_BEFORE + 1)):
                self._graphs.run(self._rows.stage_decode(_NO_IDS, _NO_IDS, size), filters, adjusts)

    def submit(self, plan: StepPlan) -> None:
        """Apply the plan's differences and begin its forward pass; a plan without rows changes state only.

        Where memory does not suffice, captured graphs and cached memory are given up for it. Raises OutOfMemory where
        that does not help.
        """
        assert len(self._in_flight) < MAX_IN_FLIGHT, "collect() comes before a third submit()"
        with torch.cuda.stream(self._steps):
            self._submit(plan)

    def _submit(self, plan: StepPlan) -> None:
        """Every part that takes memory may run twice: the second time it finds, or does again, what the first did."""
        self._change(plan)
        flight = Flight(plan, self._wishes.log_probs_of(plan.rows[plan.samples]))
        if not plan.rows.size:
            self._rows.flush()
        else:
            begin, lines = self._staged(plan), np.arange(len(flight.log_probs_L), dtype=np.int32)
            flight.results.append(self._within_memory(lambda: self._fetched(begin, lines)))
        self._in_flight.append(flight)

    def _change(self, plan: StepPlan) -> None:
        """What the plan changes before it runs; of rows it is there with the next pass."""
        wishes = self._within_memory(lambda: self._wishes.prepared(plan))
        self._wishes.change(plan, wishes)
        self._rows.change(plan, wishes)
        for copy in self._copies_of(plan):
            self._within_memory(copy)

    def _staged(self, plan: StepPlan) -> Callable[[], Tensor]:
        """What begins the pass of a plan that has rows, which are on their way to the device."""
        kinds = self._wishes.kinds_of(plan.rows[plan.samples])
        if is_decode(plan):
            staged = self._rows.stage_decode(plan.rows, plan.starts_at, self._graphs.bucket_of(plan.rows.size))
            return partial(self._graphs.run, staged, *kinds)
        return partial(self._mixed, plan, self._rows.stage_mixed(plan, plan.num_tokens), *kinds)

    def collect(self) -> StepResult:
        """Wait for the oldest submitted plan and return its ids; rows whose logits are not finite are `broken`."""
        assert self._in_flight, "submit() comes before collect()"
        flight = self._in_flight.popleft()
        found = np.zeros((3, len(flight.log_probs_L)), np.int32)
        for results in flight.results:
            if results.arrived is not None:
                results.arrived.synchronize()
            found[:, results.lines] = results.on_host.numpy()
        ids_L, log_prob_bits_L, are_bad_L = found
        broken_L, log_probs_L = are_bad_L.astype(np.bool_), None
        if flight.log_probs_L.any():
            log_probs_L = np.where(flight.log_probs_L, log_prob_bits_L.view(np.float32), np.float32(np.nan))
        return StepResult(flight.plan.step, ids_L, log_probs_L, broken_L if broken_L.any() else None)

    def close(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._graphs.close()
        self._model.close()

    # --- passes

    def _padding(self, num_tokens: int) -> StepPlan:
        """So many tokens, or as many as a step can have, in chunks that sequences can have: their keys are read."""
        longest, most_rows = self.limits.max_model_len, self.limits.max_num_seqs
        num_chunks, rest = divmod(min(num_tokens, longest * most_rows), longest)
        return _padding([longest] * num_chunks + [rest] * (rest > 0))

    def _warm_up_mixed(self, plan: StepPlan) -> None:
        self._mixed(plan, self._rows.stage_mixed(plan, plan.num_tokens), False, False)

    def _decode(self, staged: StagedStep, filters: bool, adjusts: bool) -> Tensor:
        """One token for every row, from its row to its result, or to the next stage; what a graph captures."""
        bucket = len(staged.rows_S)
        ids, positions, slots, lens = (self._integers(bucket) for _ in range(4))
        self._prepare(staged, ids, positions, slots, lens)
        workspace, tiles = self._splits_of(bucket)
        inputs = DeviceInputs(
            ids_T=ids,
            positions_T=positions,
            slots_T=slots,
            tables_SM=self._tables(staged.rows_S),
            lens_S=lens,
            workspace=workspace,
            tiles=tiles,
            hidden_TH=self._hidden_of(bucket),
        )
        return self._sample(self._model.forward(inputs), staged.sample_rows_L, filters, adjusts)

    def _mixed(self, plan: StepPlan, staged: StagedStep, filters: bool, adjusts: bool) -> Tensor:
        """Tokens of rows as planned, from their rows to the results of those that sample, or to the next stage."""
        ids, positions, slots = (self._integers(plan.num_tokens) for _ in range(3))
        self._prepare(staged, ids, positions, slots, None)
        workspace, tiles = None, None
        if staged.long_lens_S is not None:
            workspace, tiles = self._splits_of(self._graphs.bucket_of(plan.rows.size))
        inputs = DeviceInputs(
            ids_T=ids,
            positions_T=positions,
            slots_T=slots,
            tables_SM=self._tables(staged.rows_S),
            token_begins=staged.token_begins,
            past_lens_S=staged.starts_S,
            max_query_len=int(plan.lengths.max()),
            take_L=staged.take_L,
            long_lens_S=None if workspace is None else staged.long_lens_S,
            workspace=workspace,
            tiles=tiles,
            hidden_TH=self._hidden_of(plan.num_tokens),
        )
        return self._sample(self._model.forward(inputs), staged.sample_rows_L, filters, adjusts)

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

    def _hidden_of(self, num_tokens: int) -> Tensor | None:
        """Where the stage before has left what a pass begins with."""
        return None if self._hidden is None else self._hidden[:num_tokens]

    def _sample(self, out: Tensor, rows_L: Tensor, filters: bool, adjusts: bool) -> Tensor:
        """Choose ids, make them tokens of their rows, and return what the host wants to know: int32 [3, L]. `out` are
        logits, or what a stage that is not the last passes on: that is returned."""
        if self._workspace is None:
            return out
        rows, num_lines = self._rows, len(rows_L)
        # Nothing is allocated after the first kernel: a pass that runs again for want of memory has counted no token.
        sampled = self._workspace.sampled(num_lines)
        results = torch.empty(3, num_lines, dtype=torch.int32, device=self._device)
        if not num_lines:
            return results
        sample(
            out,
            rows_L,
            rows.state,
            rows.num_tokens_R,
            rows.parameters,
            self._workspace,
            stride_tokens=rows.stride_tokens,
            filters=filters,
            adjusts=adjusts,
            out=sampled,
        )
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

    def _fetched(self, begin: Callable[[], Tensor], lines: Int32Array) -> Results:
        """The results of a pass, which begins here. All memory that they need is there before it does."""
        kept, on_host = self._room(len(lines))
        kept.copy_(begin()[:, : len(lines)])  # a captured graph writes to the same place again
        return self._sent_home(lines, kept, on_host)

    def _room(self, num_lines: int) -> tuple[Tensor, Tensor]:
        """For results, on the device and on the host: the same where that is one."""
        kept = torch.empty(3, num_lines, dtype=torch.int32, device=self._device)
        if self._copies is None:
            return kept, kept
        return kept, torch.empty(kept.shape, dtype=torch.int32, pin_memory=True)

    def _sent_home(self, lines: Int32Array, kept: Tensor, on_host: Tensor) -> Results:
        """What the current stream leaves in `kept` goes to the host on a stream of its own: the next step need not
        wait."""
        if self._copies is None:
            return Results(lines, on_host, kept)
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            on_host.copy_(kept, non_blocking=True)
            return Results(lines, on_host, kept, self._copies.record_event())

    def _within_memory(self, call: Callable[[], T]) -> T:
        """`call`, and once more where memory did not suffice, after giving up what can be spared."""
        try:
            return call()
        except RuntimeError as error:
            if not is_shortage(error):
                raise
            if not self._is_alone:
                raise self._lack_of_memory(error) from None
            self._make_room(error)
        try:
            return call()
        except RuntimeError as error:
            if not is_shortage(error):
                raise
            raise self._lack_of_memory(error) from None

    def _lack_of_memory(self, error: RuntimeError) -> OutOfMemory:
        return OutOfMemory(f"{self._device}: a step did not find its memory: {first_line(error)}")

    def _make_room(self, error: RuntimeError) -> None:
        self.num_shortages += 1
        log.warning("%s; captured graphs and cached memory are given up, the step runs again", first_line(error))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # no graph is running
        self._graphs.release()
        self._splits.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _copies_of(self, plan: StepPlan) -> Iterator[Callable[[], None]]:
        """Copies of blocks, in order. None of them changes what it reads."""
        blocks, device = self._model.blocks, self._device
        if (out_blocks := plan.copy_out_blocks) is not None and (out_slots := plan.copy_out_slots) is not None:
            yield lambda: blocks.copy_out(copied(out_blocks, device), _index(out_slots))
        if (in_slots := plan.copy_in_slots) is not None and (in_blocks := plan.copy_in_blocks) is not None:
            yield lambda: blocks.copy_in(_index(in_slots), copied(in_blocks, device))
        if (sources := plan.copy_sources) is not None and (targets := plan.copy_targets) is not None and sources.size:
            yield lambda: blocks.copy(copied(sources, device), copied(targets, device))

    def _splits_of(self, num_rows: int) -> tuple[SplitWorkspace | None, AttentionTiles]:
        """How so many rows decode: measured on this card, or estimated; and the workspace for it, made once."""
        if num_rows not in self._splits:
            c, longest, cache = self._model.config, self.limits.max_model_len, self._model.blocks.element
            measured = measured_tiles(
                self._model.activations, cache, num_rows, c.num_heads, c.num_kv_heads, c.head_dim, longest, self._device
            )
            tiles = measured or default_tiles(
                num_rows, c.num_kv_heads, c.head_dim, cache.itemsize, longest, self._num_sms
            )
            workspace = None
            if tiles.num_splits > 1:
                sizes = (num_rows, c.num_heads, tiles.num_splits, c.head_dim)
                workspace = SplitWorkspace.empty(*sizes, self._device)
            self._splits[num_rows] = workspace, tiles
        return self._splits[num_rows]


def is_decode(plan: StepPlan) -> bool:
    """Whether a plan is one token for each of its rows, all of which sample: such passes are captured."""
    return bool(plan.num_tokens == plan.rows.size and plan.samples.all())


def _up_to(most: int) -> list[int]:
    """Powers of two below `most`, and `most`."""
    return [*(1 << exponent for exponent in range((most - 1).bit_length())), most]


def _padding(lengths: Sequence[int], starts_at: int = 0) -> StepPlan:
    """A step that nobody has: it writes nowhere."""
    return StepPlan(
        step=-1,
        rows=np.full(len(lengths), -1, np.int32),
        starts_at=np.full(len(lengths), starts_at, np.int32),
        lengths=np.array(lengths, np.int32),
        samples=np.ones(len(lengths), np.bool_),
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
