"""The front: the stub's side of the engine. Requests go in from any thread, events come out of one.

One response thread blocks for frames and takes whatever is there, so when it falls behind, the tokens of one sequence
are joined into one event; when it does not, every token, the first before all, goes out as it comes. Since the front
keeps every id it has received, a core that dies is no loss: each open sequence goes to the next core as a request with
its output so far, and sampling, keyed by position, continues as if nothing had happened.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from pageflight.core.errors import Draining, EngineLost, InvalidArgument, PageflightError, PoisonRequest, QueueFull
from pageflight.core.events import TokenEvent
from pageflight.core.plan import Finished
from pageflight.loop.address import CoreAddress, process_exists
from pageflight.loop.client import CoreClient, Disconnected
from pageflight.loop.core_link import CoreLink
from pageflight.loop.deadlines import Deadlines
from pageflight.loop.deaths import read_deaths
from pageflight.loop.frames import (
    PROTOCOL,
    Beat,
    CoreLimits,
    FromCore,
    Hello,
    Rejected,
    StatsFrame,
    StepFrame,
    error_from_wire,
    float32_of,
    int32_of,
    int64_of,
)
from pageflight.loop.observer import Observer
from pageflight.loop.open_sequence import Generation, OpenSequence, SharedStops, Sink, TextSource, request_of
from pageflight.loop.outbox import Outbox
from pageflight.loop.pacing import Pacing
from pageflight.loop.status import read_status
from pageflight.loop.takeover import original_of, probe, replays
from pageflight.sched.admission import AdmissionLimits

__all__ = ["Front", "Generation", "Observer", "Sink"]

log = logging.getLogger(__name__)

_STATUS_INTERVAL_S = 0.1
_TICK_S = 0.5
"""How often deadlines are looked at while a core says nothing; without a core it is `_STATUS_INTERVAL_S`."""
_DEADLINE_SLACK_S = 1.0
"""A core ends what is late itself, between two steps. After so long its front does."""
_NO_SUPERVISOR_LIMIT_S = 30.0
"""A new stub of the engine model needs some seconds to start, more on a busy machine."""


class Front:
    """Connection of one Triton model instance to its engine core."""

    def __init__(
        self,
        address: CoreAddress,
        text: TextSource,
        observer: Observer,
        *,
        response_rate: int | None = None,
        is_ending: Callable[[], bool] = lambda: False,
    ) -> None:
        """`response_rate`: see `Pacing`. `is_ending` is asked with every request: whether to refuse it (Draining)."""
        self._address, self._text, self._observer = address, text, observer
        self._is_ending = is_ending
        self._outbox = Outbox(Pacing(response_rate), self._cancel_unheard)
        self._client = CoreClient(address)
        self._lock = threading.Lock()  # guards what submit and cancel share with the response thread
        self._idle = threading.Condition(self._lock)
        self._open: dict[int, OpenSequence] = {}
        self._groups: dict[int, list[OpenSequence]] = {}  # what is open of each generation
        self._next_handle = 0
        self._guilty: dict[OpenSequence, None] = {}  # kept from the core until the probe shows that it works
        self._probe = -1  # its handle
        self._deadlines = Deadlines(self._groups.__contains__)
        self._core = CoreLink(self._client)
        self._num_restarts = 0
        self._limits: CoreLimits | None = None
        self._admission: AdmissionLimits | None = None
        self._lost: PageflightError | None = None
        self._disconnected_s = time.monotonic()
        self._draining = False
        self._stopping = False
        self._settled = threading.Event()  # ready, or lost
        self._thread = threading.Thread(target=self._run, name="front-responses", daemon=True)
        self._thread.start()

    # ---- any thread

    @property
    def limits(self) -> CoreLimits:
        """What the core said of itself. Raises EngineLost before the first core was ready."""
        if self._limits is None:
            raise self._loss or EngineLost("the engine core is not ready yet")
        return self._limits

    @property
    def is_ready(self) -> bool:
        """Whether a core takes requests and has spoken lately. While one restarts, requests are accepted and wait."""
        return self._core.answers and not self._draining and not self._is_ending()

    @property
    def num_open(self) -> int:
        """Sequences without their final event."""
        return len(self._open)

    def wait_ready(self, timeout_s: float) -> None:
        """Block until the core is ready. Raises the typed error that keeps it from starting, or EngineLost."""
        settled = self._settled.wait(timeout_s)
        if self._lost is not None:
            raise self._lost
        if not settled:
            status = read_status(self._address.status)
            heard = "there is no supervisor" if status is None else f"it is {status.state} {status.progress}".rstrip()
            raise EngineLost(f"the engine core is not ready after {timeout_s:g} s: {heard}")

    def submit(self, generation: Generation, sink: Sink) -> int:
        """Start `generation`; its events go to `sink` on the response thread, per sequence in order, one of them final.

        Returns the id for `cancel`. Raises InvalidArgument and its kinds for what can never work, QueueFull while no
        core answers and enough wait for it, Draining, EngineLost.
        """
        try:
            return self._submit(generation, sink)
        except PageflightError as error:
            self._observer.refused(type(error).__name__)
            raise

    def _submit(self, generation: Generation, sink: Sink) -> int:
        stops = SharedStops.of(generation)
        if self._admission is None:
            raise self._loss or EngineLost("the engine core is not ready yet")
        num_sequences = generation.sampling.n
        self._admission.admit(request_of(generation, handle=0))
        with self._lock:
            leader = self._next_handle
            self._next_handle += num_sequences
        sequences = [
            OpenSequence(generation, sink, stops, self._text, leader=leader, index=index)
            for index in range(num_sequences)
        ]
        request, deadline_s = original_of(sequences[0]), sequences[0].deadline_s
        with self._lock:
            if self._loss is not None:
                raise self._loss
            if self._draining or self._is_ending():
                raise Draining("the server is shutting down and takes no new requests; send it elsewhere")
            if not self._core.answers:
                self._check_room(num_sequences)
            self._open.update((sequence.handle, sequence) for sequence in sequences)
            self._groups[leader] = sequences
            if deadline_s is not None:
                self._deadlines.add(deadline_s, leader)
            if self._core.is_up:
                self._core.submit(request, sequences)
        return leader

    def _check_room(self, count: int) -> None:
        """While no core answers, its front keeps the limit of its queue. Raises QueueFull."""
        assert self._limits is not None
        num_queued = len(self._open) - self._limits.max_num_seqs  # if all rows were taken
        if num_queued + count > self._limits.max_queue_size:
            raise QueueFull(max(0, num_queued), self._limits.max_queue_size)

    @property
    def _loss(self) -> EngineLost | None:
        """Why no core will come, as clients are told: their requests were valid, whatever the engine lacks."""
        return EngineLost(str(self._lost)) if self._lost is not None else None

    def cancel(self, generation_id: int) -> None:
        """End what is still open of a generation; each of its sequences gets its final event, `cancelled`."""
        with self._lock:
            handles = []
            for sequence in self._groups.get(generation_id, ()):
                if sequence.ending is None:
                    sequence.ending = "cancelled"
                    handles.append(sequence.handle)
            self._let_go(handles)

    def cut_off(self) -> None:
        """End everything that is open, as `Draining`: the server cannot wait any longer."""
        with self._lock:
            self._cut_off()

    def _cut_off(self) -> None:
        handles = [sequence.handle for sequence in self._open.values() if sequence.ending is None]
        for handle in handles:
            self._open[handle].ending = "cancelled"
            self._open[handle].end_error = Draining("the server ended before this request did; send it elsewhere")
        self._let_go(handles)

    def close(self, drain_timeout_s: float) -> None:
        """Refuse new requests, give the open ones so long to finish, cut off the rest, and end the response thread."""
        with self._lock:
            self._draining = True
            self._idle.wait_for(lambda: not self._open, drain_timeout_s)
            self._cut_off()
            self._idle.wait_for(lambda: not self._open, 1.0)  # the core's word on them
            self._stopping = True
        self._client.wake()
        self._thread.join()

    # ---- response thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                is_waiting = not self._core.is_up and self._lost is None
                patience_s = self._outbox.patience_s or (_STATUS_INTERVAL_S if is_waiting else _TICK_S)
                self._handle(self._client.receive(patience_s))
                self._outbox.tell_overdue()
                self._end_late()
                if not self._core.is_up and self._lost is None:
                    self._end_decided()
                    self._look_for_supervisor()
        except BaseException as error:
            log.exception("the response thread failed")
            self._give_up(EngineLost(f"the front failed: {type(error).__name__}"))
            raise
        finally:
            self._core.leave()
            for sequence in list(self._open.values()):
                sequence.ending = sequence.ending or "cancelled"
                self._finish(sequence, "", "cancelled", None)
            self._client.close()

    def _handle(self, messages: list[FromCore | Disconnected]) -> None:
        touched: dict[OpenSequence, None] = {}
        ended: list[tuple[OpenSequence, Finished]] = []
        now_ns = time.monotonic_ns()
        if messages and self._core.is_up:
            self._core.hear()
        for message in messages:
            if isinstance(message, StepFrame):
                if message.epoch == self._core.epoch:
                    self._collect(message, touched, ended)
                continue
            self._deliver(touched, ended, now_ns)
            touched, ended = {}, []
            if isinstance(message, StatsFrame):
                self._observer.core_stats(message.stats)
            elif isinstance(message, Beat):
                with self._lock:
                    self._core.confirm(message)
            elif isinstance(message, Rejected):
                self._reject(message)
            elif isinstance(message, Hello):
                self._welcome(message)
            elif isinstance(message, Disconnected):
                self._disconnect()
        self._deliver(touched, ended, now_ns)

    def _collect(
        self,
        frame: StepFrame,
        touched: dict[OpenSequence, None],
        ended: list[tuple[OpenSequence, Finished]],
    ) -> None:
        open_sequences = self._open
        handles, ids = int64_of(frame.handles).tolist(), int32_of(frame.ids).tolist()
        for handle, index in zip(handles, ids, strict=True):
            sequence = open_sequences.get(handle)
            if sequence is not None and sequence.ending is None:
                sequence.fresh.append(index)
                touched[sequence] = None
        if frame.log_probs is not None:
            for handle, log_prob in zip(handles, float32_of(frame.log_probs).tolist(), strict=True):
                sequence = open_sequences.get(handle)
                if sequence is not None and sequence.ending is None and sequence.generation.sampling.log_probs:
                    sequence.fresh_log_probs.append(log_prob)
        for finished in frame.finished:
            sequence = open_sequences.get(finished.handle)
            if sequence is not None:
                ended.append((sequence, finished))
            elif finished.handle == self._probe:
                self._convict()

    def _deliver(
        self, touched: dict[OpenSequence, None], ended: list[tuple[OpenSequence, Finished]], now_ns: int
    ) -> None:
        finals = dict(ended)
        stopped: list[int] = []
        self._outbox.share_among(len(touched))
        for sequence in touched:
            text = self._take(sequence, now_ns)
            if sequence.ending is not None:
                stopped.append(sequence.handle)
            finished = finals.pop(sequence, None)
            if finished is not None:
                self._finish(sequence, text, finished.reason, finished)
                continue
            sequence.hold(text)
            if sequence.generation.stream:
                self._outbox.add(sequence, now_ns)
        for sequence, finished in finals.items():
            self._finish(sequence, "", finished.reason, finished)
        if stopped:
            with self._lock:
                self._let_go([handle for handle in stopped if handle in self._open])

    def _cancel_unheard(self, sequence: OpenSequence) -> None:
        sequence.ending = "cancelled"
        with self._lock:
            self._let_go([sequence.handle])

    def _take(self, sequence: OpenSequence, now_ns: int) -> str:
        count = len(sequence.fresh)
        sequence.suspicion.produced(count)
        if sequence.first_token_ns:
            self._observer.inter_token((now_ns - sequence.last_token_ns) * 1e-9, count)
        else:
            sequence.first_token_ns = now_ns
            self._observer.first_token((now_ns - sequence.arrival_ns) * 1e-9)
        sequence.last_token_ns = now_ns
        return sequence.take()

    def _finish(
        self,
        sequence: OpenSequence,
        text: str,
        reason: str,
        finished: Finished | None,
        error: PageflightError | None = None,
    ) -> None:
        """Deliver the final event, if it has not been yet."""
        event = self._end(sequence, text, reason, finished, error)
        if event is None:
            return
        assert event.usage is not None and event.finish_reason is not None
        now_ns = time.monotonic_ns()
        scheduled_ns = sequence.scheduled_ns(finished) or sequence.first_token_ns or now_ns
        self._observer.finished(
            event.finish_reason,
            (now_ns - sequence.arrival_ns) * 1e-9,
            (scheduled_ns - sequence.arrival_ns) * 1e-9,
            event.usage.num_input_tokens,
            event.usage.num_output_tokens,
        )

    def _end(
        self,
        sequence: OpenSequence,
        text: str,
        reason: str,
        finished: Finished | None,
        error: PageflightError | None,
    ) -> TokenEvent | None:
        with self._lock:
            if self._open.pop(sequence.handle, None) is None:
                return None
            self._outbox.forget(sequence)
            group = self._groups[sequence.leader]
            group.remove(sequence)
            if not group:
                del self._groups[sequence.leader]
        event = sequence.final_event(text, sequence.ending or reason, finished, error)
        try:
            sequence.sink(event)
        except Exception:
            log.exception("the receiver of request %r failed at its end", sequence.generation.request_id)
        with self._lock:
            if not self._open:
                self._idle.notify_all()
        return event

    def _let_go(self, handles: list[int]) -> None:
        """Tell the core to end these. Under the lock; without a core the response thread ends them itself."""
        if not self._core.is_up:
            self._client.wake()
            return
        for by_client in (False, True):
            some = tuple(handle for handle in handles if (self._open[handle].ending == "cancelled") is by_client)
            self._core.end(some, by_client=by_client)

    def _reject(self, message: Rejected) -> None:
        if message.epoch != self._core.epoch:
            return
        if message.handle == self._probe:  # it asked for nothing new, so the engine takes nothing at all
            return self._convict()
        leader = self._open.get(message.handle)
        if leader is None:
            return
        error = error_from_wire(message.error, message.message)
        if leader.is_known and isinstance(error, InvalidArgument):  # it was valid for the core that accepted it
            error = EngineLost(f"the engine core that took over cannot carry the request on: {error}")
        self._observer.refused(type(error).__name__)
        count = 1 if leader.alone else leader.generation.sampling.n
        for handle in range(message.handle, message.handle + count):
            if handle in self._open:  # refused, so nothing that the histograms of finished requests should count
                self._end(self._open[handle], "", "error", None, error)

    def _end_late(self) -> None:
        """Deadlines hold without a core, and with one that does not come to its own look at them."""
        now_s = time.monotonic() - (_DEADLINE_SLACK_S if self._core.is_up else 0.0)
        if not self._deadlines.has_expired(now_s):
            return
        with self._lock:
            late = [sequence for leader in self._deadlines.pop_expired(now_s) for sequence in self._groups[leader]]
            self._core.end(tuple(sequence.handle for sequence in late), by_client=False)
        for sequence in late:
            self._finish(sequence, "", "deadline", None)

    # ---- cores that come and go, response thread

    def _welcome(self, hello: Hello) -> None:
        if hello.epoch == self._core.epoch:
            return
        if hello.protocol != PROTOCOL:
            return self._give_up(EngineLost(f"engine core speaks protocol {hello.protocol}, this front {PROTOCOL}"))
        is_restart = self._core.last_epoch is not None
        for sequence in list(self._open.values()):
            reason = sequence.ended_by_itself()
            if sequence.ending is None and reason is not None:
                self._finish(sequence, "", reason, None)
        self._find_guilty()
        limits = hello.limits
        with self._lock:
            self._limits = limits
            self._admission = AdmissionLimits(
                max_model_len=limits.max_model_len,
                num_blocks=limits.num_blocks,
                block_size=limits.block_size,
                vocab_size=limits.vocab_size,
                max_sequences=limits.max_queue_size,
            )
            self._lost = None
            self._core.meet(hello)
            self._hand_over()
            # What was cancelled until now the core will never hear of; what is from now on, it is told.
            decided = [sequence for sequence in self._open.values() if sequence.ending is not None]
        for sequence in decided:
            self._finish(sequence, "", "cancelled", None)
        self._settled.set()
        if is_restart:
            log.warning("another engine core took over: %d sequences continue", len(self._open))
        status = read_status(self._address.status)
        num_restarts = status.restarts if status is not None else self._num_restarts
        if is_restart or num_restarts > self._num_restarts:
            self._observer.restarted(max(0, num_restarts - self._num_restarts), len(self._open) if is_restart else 0)
        self._num_restarts = num_restarts

    def _hand_over(self) -> None:
        """Ask the core for everything that is open. Under the lock."""
        if self._guilty:
            self._probe, self._next_handle = self._next_handle, self._next_handle + 1
            self._core.submit(probe(self._probe), [])
        innocent = ([s for s in group if s not in self._guilty] for group in self._groups.values())
        for request, sequences in replays(innocent):
            self._core.submit(request, sequences)

    def _find_guilty(self) -> None:
        """Count the last core's death against the sequences it was working on; find those that kill every core."""
        death = read_deaths(self._address.deaths).get(self._core.last_epoch or 0)
        if death is None:
            return
        for sequence in list(self._open.values()):
            if self._core.blame(death, sequence):
                siblings = self._groups[sequence.leader]
                # Without a token of any of them it is the prompt that kills, and they have it in common.
                is_prompt = not any(sibling.output_ids for sibling in siblings)
                self._guilty.update(dict.fromkeys(siblings if is_prompt else [sequence]))

    def _convict(self) -> None:
        """The engine works, so what has killed it is to blame."""
        guilty, self._guilty, self._probe = self._guilty, {}, -1
        for number in {sequence.generation.request_id: sequence for sequence in guilty}:
            log.error("request %r kills the engine core; it is given up", number)
        for sequence in guilty:
            if sequence.handle in self._open:
                poison = PoisonRequest("the engine core died each time it computed this request; do not send it again")
                self._observer.poisoned()
                self._finish(sequence, "", "error", None, poison)

    def _disconnect(self) -> None:
        with self._lock:
            self._core.lose()
        self._disconnected_s = time.monotonic()

    def _end_decided(self) -> None:
        """Sequences whose end the front has decided do not need a core to confirm it when there is none."""
        for sequence in list(self._open.values()):
            if sequence.ending is not None:
                self._finish(sequence, "", sequence.ending, None)

    def _look_for_supervisor(self) -> None:
        """While there is no core: is one coming, or is all lost?"""
        status = read_status(self._address.status)
        if status is None or not process_exists(status.supervisor_pid):
            # A front may come up before its supervisor; and one that had a core waits a moment for a new supervisor.
            if self._core.last_epoch is not None and time.monotonic() - self._disconnected_s > _NO_SUPERVISOR_LIMIT_S:
                self._give_up(EngineLost("the engine core and its supervisor are gone"))
        elif status.state in ("lost", "closed"):
            self._give_up(status.failure or EngineLost("the engine core was closed"))

    def _give_up(self, error: PageflightError) -> None:
        with self._lock:
            self._lost = error
            self._core.lose()
        for sequence in list(self._open.values()):
            self._finish(sequence, "", "error", None, self._loss)
        self._settled.set()
