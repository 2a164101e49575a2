"""StageRunner: one stage of a model in this process; micro-batches come from the stage before and go to the next one.

Shapes: T packed tokens of a micro-batch, H hidden, L rows of it that sample, V vocabulary.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pageflight.core.plan import StepPlan, StepResult
from pageflight.kv.capacity import Capacity
from pageflight.lowering.base import StepInputs
from pageflight.lowering.communicator import Communicator
from pageflight.lowering.passes import split
from pageflight.runners.base import RunnerLimits
from pageflight.runners.host_batch import BlockCopies, HostBatch
from pageflight.runners.inputs import BatchRows
from pageflight.runners.local import measure_copies
from pageflight.runners.micro_batches import MicroBatch, micro_batches
from pageflight.runners.token_order import TokenOrder
from pageflight.sampling.sampler import Sampler

Int32Array = NDArray[np.int32]
MAX_IN_FLIGHT = 2
JOIN_S = 1.0
"""What threads get to end: where another rank is gone they may wait for it for ever."""
_NO_IDS = np.zeros(0, np.int32)


class StageModel(BlockCopies, Protocol):
    """The layers of a stage (`lowering.torch_lowering.TorchModel`)."""

    block_size: int
    vocab_size: int
    replay_rows: int
    num_threads: int

    def allocate(self, num_blocks: int, num_host_blocks: int = 0) -> None: ...
    def forward(self, inputs: StepInputs, x: Tensor | None = None) -> Tensor: ...
    def hidden(self, num_tokens: int) -> Tensor: ...
    def close(self) -> None: ...


@dataclass(slots=True, eq=False)
class _Flight:
    """A step on its way. `results` [3, L]: ids, bits of log probabilities (NaN: not asked for), whether broken."""

    plan: StepPlan
    results: Int32Array
    num_missing: int | None = None  # micro-batches whose results are not here; None: not begun

    @property
    def is_done(self) -> bool:
        return self.num_missing == 0

    def result(self) -> StepResult:
        if not self.results.shape[1]:
            return StepResult(self.plan.step, _NO_IDS)
        ids, bits, broken = self.results
        log_probs, are_broken = bits.view(np.float32), broken.astype(np.bool_)
        return StepResult(
            self.plan.step,
            ids.copy(),
            None if np.isnan(log_probs).all() else log_probs.copy(),
            are_broken if are_broken.any() else None,
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Sent:
    """A micro-batch that this stage has computed; its results [3, max(L, 1)] come from the last one."""

    number: int
    flight: _Flight
    batch: MicroBatch


class StageRunner:
    """Runs its stage's layers of every plan, on a thread of its own. All stages get the same plans.

    A step is cut into `num_micro_batches`, as many as there are stages or more, so that no stage waits while another
    computes. Two steps may be in flight: a micro-batch of the second waits for the ids of its own rows only, not for
    the whole of the first. The last stage samples and tells the others, whose rows then have these tokens, too.
    """

    def __init__(
        self,
        model: StageModel,
        communicator: Communicator,
        capacity: Capacity,
        *,
        max_num_seqs: int,
        num_micro_batches: int,
        deterministic: bool = False,
    ) -> None:
        """Allocate the blocks of both levels. `deterministic`: passes are of one sequence and one block."""
        kv, place = capacity.kv, communicator.place
        model.allocate(kv.num_blocks, kv.num_host_blocks)
        self.limits = RunnerLimits(
            num_blocks=kv.num_blocks,
            num_host_blocks=kv.num_host_blocks,
            host_copy_s=measure_copies(model, min(kv.num_blocks, kv.num_host_blocks)),
            block_size=model.block_size,
            max_num_seqs=max_num_seqs,
            max_model_len=capacity.max_sequence_len,
            vocab_size=model.vocab_size,
            replay_rows=capacity.max_sequence_len if deterministic else model.replay_rows,
            max_in_flight=MAX_IN_FLIGHT,
        )
        self.busy_s = 0.0
        """Seconds of computing, so far."""
        self._model, self._line, self._runs_alone = model, communicator, deterministic
        self._is_first, self._is_last = place.stage == 0, place.stage == place.pipeline_parallel - 1
        self._num_micro_batches = num_micro_batches
        rows = BatchRows(
            max_num_seqs=max_num_seqs,
            max_model_len=capacity.max_sequence_len,
            block_size=model.block_size,
            splits_output=deterministic,
        )
        sampler = Sampler(max_num_seqs=max_num_seqs, vocab_size=model.vocab_size) if self._is_last else None
        self._batch = HostBatch(model, rows, sampler)
        self._order = TokenOrder(max_num_seqs)
        self._changed = threading.Condition()
        self._flights: deque[_Flight] = deque()  # submitted, not collected
        self._to_run: deque[_Flight] = deque()
        self._sent: deque[_Sent] = deque()
        self._heard: deque[tuple[_Sent, Int32Array]] = deque()
        self._num_heard = 0
        self._error: BaseException | None = None
        self._is_closing = False
        work = [self._compute] if self._is_last else [self._compute, self._listen]
        self._threads = [threading.Thread(target=self._guarded, args=(each,), daemon=True) for each in work]
        for thread in self._threads:
            thread.start()

    # --- the caller's side

    def submit(self, plan: StepPlan) -> None:
        """Queue the plan for this stage. Raises what has gone wrong since."""
        with self._changed:
            self._check()
            assert len(self._flights) < MAX_IN_FLIGHT, "collect() comes before a third submit()"
            flight = _Flight(plan, np.zeros((3, int(plan.samples.sum())), np.int32))
            self._flights.append(flight)
            self._to_run.append(flight)
            self._changed.notify_all()

    def collect(self) -> StepResult:
        """Wait for the oldest submitted plan to have passed the last stage, and return its ids."""
        with self._changed:
            assert self._flights, "submit() comes before collect()"
            self._changed.wait_for(lambda: self._flights[0].is_done or self._error is not None)
            self._check()
            return self._flights.popleft().result()

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(JOIN_S)
        self._model.close()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    # --- threads

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # whoever submits or collects has to know
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _compute(self) -> None:
        torch.set_num_threads(self._model.num_threads)  # is a thread's own
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._to_run or self._is_closing)
                if self._is_closing:
                    return
                flight = self._to_run.popleft()
            self._run(flight)

    def _run(self, flight: _Flight) -> None:
        plan = flight.plan
        self._batch.apply(plan)
        self._order.change(plan)
        batches = micro_batches(plan, self._num_micro_batches, self.limits.block_size)
        with self._changed:
            flight.num_missing = len(batches)
            self._changed.notify_all()
        for batch in batches:
            self._await_ids(batch.plan.rows)
            inputs = self._batch.rows.prepare(batch.plan)
            x = None if self._is_first else self._line.take_over(self._model.hidden(len(inputs.ids_T)))
            begin_s = time.perf_counter()
            out = self._forward(inputs, x)
            if not self._is_last:
                self.busy_s += time.perf_counter() - begin_s
                number = self._order.computed(batch)
                self._line.pass_on(out)
                with self._changed:
                    self._sent.append(_Sent(number, flight, batch))
                    self._changed.notify_all()
                continue
            result = self._batch.sample(batch.plan, out.numpy())
            if result.broken is not None:  # the next step may be under way with them: any token will do
                broken_rows = batch.plan.rows[batch.plan.samples][result.broken]
                self._batch.rows.append(broken_rows, np.zeros(broken_rows.size, np.int32))
            results = _packed(result)
            self.busy_s += time.perf_counter() - begin_s
            self._line.announce(torch.from_numpy(results))
            with self._changed:
                self._arrived(flight, batch, results)

    def _forward(self, inputs: StepInputs, x: Tensor | None) -> Tensor:
        if not self._runs_alone:
            return self._model.forward(inputs, x)
        outs, at = [], 0
        for piece, _ in split(inputs, self.limits.block_size):
            end = at + len(piece.ids_T)
            outs.append(self._model.forward(piece, None if x is None else x[at:end]))
            at = end
        return torch.cat(outs)

    def _await_ids(self, rows: Int32Array) -> None:
        """Until the tokens of `rows` are here; those of others become theirs as they come."""
        if self._is_last:
            return
        wanted = self._order.wanted(rows)
        with self._changed:
            self._changed.wait_for(lambda: self._num_heard >= wanted or self._is_closing or self._error is not None)
            self._check()
            assert self._num_heard >= wanted, "closed while a step was in flight"
            heard, self._heard = self._heard, deque()
        for sent, results in heard:
            rows_L = sent.batch.plan.rows[sent.batch.plan.samples]
            ids_L = results[0, : rows_L.size]
            is_theirs = self._order.is_theirs(sent.number, rows_L)
            self._batch.rows.append(rows_L[is_theirs], ids_L[is_theirs])

    def _listen(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._sent or self._is_closing)
                if self._is_closing:
                    return
                sent = self._sent.popleft()
            results = np.zeros((3, max(1, len(sent.batch.lines))), np.int32)
            self._line.hear(torch.from_numpy(results))
            with self._changed:
                self._heard.append((sent, results))
                self._num_heard = sent.number
                self._arrived(sent.flight, sent.batch, results)

    def _arrived(self, flight: _Flight, batch: MicroBatch, results: Int32Array) -> None:
        assert flight.num_missing, "a result of a step that has all of them"
        flight.results[:, batch.lines] = results[:, : len(batch.lines)]
        flight.num_missing -= 1
        self._changed.notify_all()


def _packed(result: StepResult) -> Int32Array:
    """[3, max(L, 1)] as in `_Flight`."""
    count = len(result.sampled_ids)
    packed = np.zeros((3, max(1, count)), np.int32)
    log_probs = np.full(count, np.nan, np.float32) if result.log_probs is None else result.log_probs
    packed[0, :count], packed[1, :count] = result.sampled_ids, log_probs.astype(np.float32).view(np.int32)
    if result.broken is not None:
        packed[2, :count] = result.broken
    return packed
