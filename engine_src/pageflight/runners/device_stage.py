"""DeviceStageRunner: one stage of a model on a GPU; micro-batches come from the stage before and go to the next one.

Shapes: T packed tokens of a micro-batch, H hidden, L rows of it that sample.

Why no rank waits for ever, whether messages wait for their receivers or not. A stage computes micro-batches in their
order on one stream. What it hands on and what the last stage announces go by two groups of ranks, each of which keeps
the order of its messages; nothing but later messages of its group waits for a send. A stage is ready for the ids of a
micro-batch as soon as it has handed it on, on a stream of its own: on that of the passes, or if asked for when they are
wanted, they would be behind later micro-batches, for which others may wait. So what a stage does with micro-batch m
waits for what stages before it do with m, and for micro-batches before m: of all that has not happened yet, the first
micro-batch at the first stage can always go on. That holds for hosts, too, where they wait: for messages with gloo, for
all streams of a GPU where a graph is captured or memory runs short. Nobody is ready for ids while no step is in flight,
which NCCL's watchdog would take for a failure.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pageflight.core.plan import StepPlan, StepResult
from pageflight.kernels.step_inputs import scatter
from pageflight.lowering.communicator import Communicator
from pageflight.lowering.device_model import DeviceModel
from pageflight.runners.device import MAX_IN_FLIGHT, DeviceRunner, Flight, is_decode
from pageflight.runners.device_wishes import copied
from pageflight.runners.micro_batches import MicroBatch, micro_batches
from pageflight.runners.token_order import TokenOrder

Int32Array = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class _Sent:
    """A micro-batch that this stage has computed; `results` [3, L] come from the last one, and are copied to `on_host`.
    None where no row samples."""

    number: int
    flight: Flight
    batch: MicroBatch
    results: Tensor | None = None
    on_host: Tensor | None = None
    wait: Callable[[], object] | None = None


class _Clock:
    """How long passes take on the current stream; what is asked of it costs the host no waiting."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        """Of all passes that are known to have ended."""
        self._is_gpu = device.type == "cuda"
        self._begun: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def timed(self, begin: Callable[[], Tensor]) -> Tensor:
        if not self._is_gpu:
            begin_s, out = time.perf_counter(), begin()
            self.seconds += time.perf_counter() - begin_s
            return out
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        out = begin()
        last.record()
        self._begun.append((first, last))
        return out

    def look(self) -> None:
        """Count passes that have ended since."""
        while self._begun and self._begun[0][1].query():  # type: ignore[no-untyped-call]
            first, last = self._begun.popleft()
            self.seconds += first.elapsed_time(last) / 1000


class DeviceStageRunner(DeviceRunner):
    """Runs its stage's layers of every plan. All stages get the same plans.

    A step is cut into `num_micro_batches`, as many as there are stages, so that no stage waits while another computes.
    Two steps may be in flight: a micro-batch of the second waits for the ids of its own rows only. The last stage
    samples and tells the others; ids become tokens of their rows on each device, without the host. Passes are captured
    as they are on one GPU: what stages send each other is outside of graphs.
    """

    def __init__(
        self,
        model: DeviceModel,
        communicator: Communicator,
        *,
        num_blocks: int,
        max_num_seqs: int,
        max_num_tokens: int,
        max_model_len: int,
        num_host_blocks: int = 0,
        num_micro_batches: int,
        uses_graphs: bool = True,
    ) -> None:
        super().__init__(
            model,
            num_blocks=num_blocks,
            num_host_blocks=num_host_blocks,
            max_num_seqs=max_num_seqs,
            max_num_tokens=max_num_tokens,
            max_model_len=max_model_len,
            uses_graphs=uses_graphs,
            is_alone=False,
            num_passes=MAX_IN_FLIGHT * num_micro_batches,
        )
        self._line, self._num_micro_batches = communicator, num_micro_batches
        self._order, self._clock = TokenOrder(max_num_seqs), _Clock(self._device)
        self._sent: deque[_Sent] = deque()  # whose results are not here
        self._num_heard = 0
        self._hearing: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._hearing = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    @property
    def busy_s(self) -> float:
        """Seconds of computing, so far."""
        return self._clock.seconds

    def collect(self) -> StepResult:
        """Wait for the oldest submitted plan to have passed the last stage, and return its ids."""
        assert self._in_flight, "submit() comes before collect()"
        while self._sent and self._sent[0].flight is self._in_flight[0]:
            self._hear(self._sent.popleft())
        result = super().collect()
        self._clock.look()
        return result

    def _submit(self, plan: StepPlan) -> None:
        self._change(plan)
        self._order.change(plan)
        flight = Flight(plan, self._wishes.log_probs_of(plan.rows[plan.samples]))
        if not plan.rows.size:
            self._rows.flush()
        for batch in micro_batches(plan, self._num_micro_batches, self.limits.block_size):
            self._within_memory(partial(self._run, flight, batch))
        self._in_flight.append(flight)

    def _run(self, flight: Flight, batch: MicroBatch) -> None:
        plan = batch.plan
        self._await_ids(plan.rows)
        begin = partial(self._clock.timed, self._staged(plan))
        if self._hidden is not None:
            self._line.take_over(self._hidden[: plan.num_tokens])  # once the pass before has read what is there
        if not self._model.stage.is_last:
            out = begin()[: plan.num_tokens]
            # What a graph has written is written over by its next run, which does not wait for who receives.
            self._line.pass_on(out.clone() if is_decode(plan) else out)
            self._sent.append(self._expected(_Sent(self._order.computed(batch), flight, batch)))
            return
        results = self._fetched(begin, batch.lines)
        if batch.lines.size:
            self._line.announce(results.kept)
        flight.results.append(results)

    def _await_ids(self, rows: Int32Array) -> None:
        """Until the tokens of `rows` are here; those of others that come before them become theirs, too."""
        wanted = self._order.wanted(rows)
        while self._num_heard < wanted:
            self._hear(self._sent.popleft())

    def _expected(self, sent: _Sent) -> _Sent:
        """With room for the ids, which may come from now on."""
        if not sent.batch.lines.size:
            return sent
        with torch.cuda.stream(self._hearing):
            results, on_host = self._room(sent.batch.lines.size)
            return replace(sent, results=results, on_host=on_host, wait=self._line.expect(results))

    def _hear(self, sent: _Sent) -> None:
        """Ids of a micro-batch, which become tokens of their rows and go to the host; what follows waits for them on
        the device."""
        self._num_heard = sent.number
        if sent.results is None or sent.on_host is None or sent.wait is None:
            return
        with torch.cuda.stream(self._hearing):
            sent.wait()
            sent.flight.results.append(self._sent_home(sent.batch.lines, sent.results, sent.on_host))
        if self._steps is not None and self._hearing is not None:
            self._steps.wait_stream(self._hearing)
            sent.results.record_stream(self._steps)
        with torch.cuda.stream(self._steps):
            self._append(sent, sent.results[0])

    def _append(self, sent: _Sent, ids_L: Tensor) -> None:
        """`ids_L` become the next tokens of their rows, where nobody else has begun in the row since."""
        plan, stride = sent.batch.plan, self._rows.stride_tokens
        rows_L, places_L = plan.rows[plan.samples], (plan.starts_at + plan.lengths)[plan.samples]
        is_kept_L = self._order.is_theirs(sent.number, rows_L) & (places_L < stride)
        if not is_kept_L.all():
            ids_L = ids_L.index_select(0, copied(np.flatnonzero(is_kept_L).astype(np.int32), self._device))
        words = (rows_L.astype(np.int64) * stride + places_L)[is_kept_L]
        scatter(self._rows.state, copied(words.astype(np.int32), self._device), ids_L)


def open_lines(line: Communicator, device: torch.device) -> None:
    """The first message between stages, before memory is measured: NCCL makes its connections with it, which takes
    memory, and the host of either side waits for the other."""
    place = line.place
    word = torch.zeros(1, dtype=torch.int32, device=device)
    is_last = place.stage == place.pipeline_parallel - 1
    if place.stage:
        line.take_over(word)
    if is_last:
        line.announce(word)
    else:
        line.pass_on(word.clone())
        line.hear(word)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
