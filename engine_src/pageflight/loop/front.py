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

from pageflight.core.errors import Draining, EngineLost, InvalidArgument, PageflightError, QueueFull
from pageflight.loop.address import CoreAddress
from pageflight.loop.book import Book, Handles
from pageflight.loop.client import CoreClient, Disconnected
from pageflight.loop.core_link import CoreLink, admission_of
from pageflight.loop.deaths import read_deaths
from pageflight.loop.endings import Endings
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
)
from pageflight.loop.news import News
from pageflight.loop.observer import Observer
from pageflight.loop.observing import observe_tokens
from pageflight.loop.open_sequence import Generation, OpenSequence, SharedStops, Sink, TextSource, request_of
from pageflight.loop.outbox import Outbox
from pageflight.loop.pacing import Pacing
from pageflight.loop.supervision import Supervision
from pageflight.loop.takeover import original_of, replays
from pageflight.loop.verdicts import Verdicts

__all__ = ["Front", "Generation", "Observer", "Sink"]

log = logging.getLogger(__name__)

_STATUS_INTERVAL_S = 0.1
_TICK_S = 0.5
"""How often deadlines are looked at while a core says nothing; without a core it is `_STATUS_INTERVAL_S`."""
_DEADLINE_SLACK_S = 1.0
"""A core ends what is late itself, between two steps. After so long its front does."""


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
        handles: Handles | None = None,
        elsewhere: Callable[[Front, list[OpenSequence]], bool] | None = None,
        overflow: Callable[[Front, list[OpenSequence]], bool] | None = None,
        reroute_after_s: float = 0.0,
    ) -> None:
        """`response_rate`: see `Pacing`. `is_ending` is asked with every request: whether to refuse it (Draining).

        `elsewhere` has another front, with the same `handles`, `adopt` the open sequences of a generation and this one
        `release` them, and says whether it did. It is asked by the response thread when no core will come, and while
        none has come for `reroute_after_s`. `overflow` does the same for a generation that the core has refused because
        its queue is full.
        """
        self._address, self._text, self._observer = address, text, observer
        self._is_ending = is_ending
        self._handles = handles or Handles()
        self._elsewhere, self._overflow, self._reroute_after_s = elsewhere, overflow, reroute_after_s
        self._judged_epoch: int | None = None  # of the last core whose death was counted
        self._outbox = Outbox(Pacing(response_rate), self._cancel_unheard)
        self._client = CoreClient(address)
        self._lock = threading.Lock()  # guards what submit and cancel share with the response thread
        self._idle = threading.Condition(self._lock)
        self._book = Book()
        self._endings = Endings(self._book, self._outbox, observer, self._idle)
        self._core = CoreLink(self._client)
        self._verdicts = Verdicts(self._core)
        self._supervision = Supervision(address)
        self._lost: PageflightError | None = None
        self._draining = False
        self._stopping = False
        self._settled = threading.Event()  # ready, or lost
        self._thread = threading.Thread(target=self._run, name="front-responses", daemon=True)
        self._thread.start()

    # ---- any thread

    @property
    def limits(self) -> CoreLimits:
        """What the core said of itself. Raises EngineLost before the first core was ready."""
        if self._core.limits is None:
            raise self._loss or EngineLost("the engine core is not ready yet")
        return self._core.limits

    @property
    def is_ready(self) -> bool:
        """Whether a core takes requests and has spoken lately. While one restarts, requests are accepted and wait."""
        return self._core.answers and not self._draining and not self._is_ending()

    @property
    def answers(self) -> bool:
        """Whether there is a core and it has spoken lately."""
        return self._core.answers

    @property
    def has_met(self) -> bool:
        """Whether a core has been ready: its limits are known."""
        return self._core.limits is not None

    @property
    def is_lost(self) -> bool:
        """Whether no core will come, as far as is known."""
        return self._lost is not None

    @property
    def num_open(self) -> int:
        """Sequences without their final event."""
        return len(self._book.open)

    def has_room(self, num_sequences: int) -> bool:
        """Whether so many sequences more may wait for the next core."""
        limits = self._core.limits
        with self._lock:
            return limits is not None and self._book.has_room(num_sequences, limits)

    def settles(self, timeout_s: float) -> bool:
        """Whether within that time the core is ready, or lost."""
        return self._settled.wait(timeout_s)

    def wait_ready(self, timeout_s: float) -> None:
        """Block until the core is ready. Raises the typed error that keeps it from starting, or EngineLost."""
        settled = self.settles(timeout_s)
        if self._lost is not None:
            raise self._lost
        if not settled:
            heard = self._supervision.describe()
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
        limits, num_sequences = self.limits, generation.sampling.n
        admission_of(limits).admit(request_of(generation, handle=0))
        leader = self._handles.take(num_sequences)
        sequences = [
            OpenSequence(generation, sink, stops, self._text, leader=leader, index=index)
            for index in range(num_sequences)
        ]
        request = original_of(sequences[0])
        with self._lock:
            if self._loss is not None:
                raise self._loss
            if self._draining or self._is_ending():
                raise Draining("the server is shutting down and takes no new requests; send it elsewhere")
            if not self._core.answers:
                self._book.check_room(num_sequences, limits)
            self._book.add(sequences)
            if self._core.is_up:
                self._core.submit(request, sequences)
        return leader

    @property
    def _loss(self) -> EngineLost | None:
        """Why no core will come, as clients are told: their requests were valid, whatever the engine lacks."""
        return EngineLost(str(self._lost)) if self._lost is not None else None

    def cancel(self, generation_id: int) -> None:
        """End what is still open of a generation; each of its sequences gets its final event, `cancelled`."""
        with self._lock:
            handles = []
            for sequence in self._book.groups.get(generation_id, ()):
                if sequence.ending is None:
                    sequence.ending = "cancelled"
                    handles.append(sequence.handle)
            self._let_go(handles)

    def adopt(self, sequences: list[OpenSequence]) -> bool:
        """Carry on with the open sequences of a generation that another front has; whether this one can. Their owner
        must not touch them any more."""
        with self._lock:
            if self._stopping or self._lost is not None or not self._core.answers:
                return False
            if any(one.ending is not None or self._core.epoch in one.refused_by for one in sequences):
                return False
            requests = list(replays([sequences]))
            try:
                for request, _ in requests:
                    admission_of(self.limits).admit(request)
            except InvalidArgument:
                return False
            self._book.add(list(sequences))
            for request, some in requests:
                self._core.submit(request, some)
        return True

    def release(self, sequences: list[OpenSequence]) -> None:
        """Forget sequences that another front has adopted."""
        with self._lock:
            for sequence in sequences:
                self._book.remove(sequence)
            if not self._book.open:
                self._idle.notify_all()

    def cut_off(self) -> None:
        """End everything that is open, as `Draining`: the server cannot wait any longer."""
        with self._lock:
            self._cut_off()

    def _cut_off(self) -> None:
        handles = [sequence.handle for sequence in self._book.open.values() if sequence.ending is None]
        for handle in handles:
            self._book.open[handle].ending = "cancelled"
            self._book.open[handle].end_error = Draining("the server ended before this request did; send it elsewhere")
        self._let_go(handles)

    def close(self, drain_timeout_s: float) -> None:
        """Refuse new requests, give the open ones so long to finish, cut off the rest, and end the response thread."""
        with self._lock:
            self._draining = True
            self._idle.wait_for(lambda: not self._book.open, drain_timeout_s)
            self._cut_off()
            self._idle.wait_for(lambda: not self._book.open, 1.0)  # the core's word on them
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
                    loss = self._supervision.loss(self._core.lost_s)
                    if loss is not None:
                        self._give_up(loss)
                    elif self._core.absent_s > self._reroute_after_s:
                        self._reroute()
        except BaseException as error:
            log.exception("the response thread failed")
            self._give_up(EngineLost(f"the front failed: {type(error).__name__}"))
            raise
        finally:
            self._core.leave()
            for sequence in list(self._book.open.values()):
                sequence.ending = sequence.ending or "cancelled"
                self._endings.finish(sequence, "", "cancelled", None)
            self._client.close()

    def _handle(self, messages: list[FromCore | Disconnected]) -> None:
        news = News()
        now_ns = time.monotonic_ns()
        if messages and self._core.is_up:
            self._core.hear()
        for message in messages:
            if isinstance(message, StepFrame):
                if message.epoch == self._core.epoch:
                    news.add(message, self._book.open)
                continue
            self._deliver(news, now_ns)
            news = News()
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
                with self._lock:
                    self._core.lose()
        self._deliver(news, now_ns)

    def _deliver(self, news: News, now_ns: int) -> None:
        finals = dict(news.ended)
        stopped: list[int] = []
        if any(map(self._verdicts.is_probe, news.strangers)):
            self._convict()
        self._outbox.share_among(len(news.touched))
        for sequence in news.touched:
            sequence.suspicion.produced(len(sequence.fresh))
            observe_tokens(self._observer, sequence, now_ns)
            text = sequence.take()
            if sequence.ending is not None:
                stopped.append(sequence.handle)
            finished = finals.pop(sequence, None)
            if finished is not None:
                self._endings.finish(sequence, text, finished.reason, finished)
                continue
            sequence.hold(text)
            if sequence.generation.stream:
                self._outbox.add(sequence, now_ns)
        for sequence, finished in finals.items():
            self._endings.finish(sequence, "", finished.reason, finished)
        if stopped:
            with self._lock:
                self._let_go([handle for handle in stopped if handle in self._book.open])

    def _cancel_unheard(self, sequence: OpenSequence) -> None:
        sequence.ending = "cancelled"
        with self._lock:
            self._let_go([sequence.handle])

    def _let_go(self, handles: list[int]) -> None:
        """Tell the core to end these. Under the lock; without a core the response thread ends them itself."""
        if not self._core.is_up:
            self._client.wake()
            return
        for by_client in (False, True):
            some = tuple(handle for handle in handles if (self._book.open[handle].ending == "cancelled") is by_client)
            self._core.end(some, by_client=by_client)

    def _reject(self, message: Rejected) -> None:
        if message.epoch != self._core.epoch:
            return
        if self._verdicts.is_probe(message.handle):  # it asked for nothing new, so the engine takes nothing at all
            return self._convict()
        leader = self._book.open.get(message.handle)
        if leader is None:
            return
        error = error_from_wire(message.error, message.message)
        if isinstance(error, Draining) and self._elsewhere is not None and not (self._draining or self._is_ending()):
            self._core.is_leaving = True  # alone, its model being loaded again: what it refused waits for the next
            return
        if leader.is_known and isinstance(error, InvalidArgument):  # it was valid for the core that accepted it
            if self._elsewhere is not None and leader.alone and self._elsewhere(self, [leader]):
                return
            error = EngineLost(f"the engine core that took over cannot carry the request on: {error}")
        if isinstance(error, QueueFull) and self._overflows(message.epoch, leader):
            return
        self._observer.refused(type(error).__name__)
        count = 1 if leader.alone else leader.generation.sampling.n
        for handle in range(message.handle, message.handle + count):
            if handle in self._book.open:
                self._endings.refuse(self._book.open[handle], error)

    def _overflows(self, epoch: int, leader: OpenSequence) -> bool:
        """Whether another core takes the generation that this one's queue has no room for. Nothing of it has begun."""
        refused = [leader] if leader.alone else list(self._book.groups[leader.leader])
        for sequence in refused:
            sequence.refused_by.add(epoch)
        if self._overflow is None or any(sequence.ending is not None for sequence in refused):
            return False
        return self._overflow(self, refused)

    def _end_late(self) -> None:
        """Deadlines hold without a core, and with one that does not come to its own look at them."""
        now_s = time.monotonic() - (_DEADLINE_SLACK_S if self._core.is_up else 0.0)
        if not self._book.has_late(now_s):
            return
        with self._lock:
            late = self._book.pop_late(now_s)
            self._core.end(tuple(sequence.handle for sequence in late), by_client=False)
        for sequence in late:
            self._endings.finish(sequence, "", "deadline", None)

    # ---- cores that come and go, response thread

    def _welcome(self, hello: Hello) -> None:
        if hello.epoch == self._core.epoch:
            return
        if hello.protocol != PROTOCOL:
            return self._give_up(EngineLost(f"engine core speaks protocol {hello.protocol}, this front {PROTOCOL}"))
        is_restart = self._core.last_epoch is not None
        self._judge()
        with self._lock:
            self._lost = None
            self._core.meet(hello)
            for request, sequences in self._verdicts.requests(self._book.groups, self._handles.take(1)):
                self._core.submit(request, sequences)
            # What was cancelled until now the core will never hear of; what is from now on, it is told.
            decided = [sequence for sequence in self._book.open.values() if sequence.ending is not None]
        for sequence in decided:
            self._endings.finish(sequence, "", "cancelled", None)
        self._settled.set()
        num_open, num_restarts = self.num_open, self._supervision.new_restarts()
        if is_restart:
            log.warning("another engine core took over: %d sequences continue", num_open)
        if is_restart or num_restarts:
            self._observer.restarted(num_restarts, num_open if is_restart else 0)

    def _judge(self) -> None:
        """What was complete when the last core died has ended; against the rest its death is counted, once."""
        for sequence in list(self._book.open.values()):
            reason = sequence.ended_by_itself()
            if sequence.ending is None and reason is not None:
                self._endings.finish(sequence, "", reason, None)
        epoch = self._core.last_epoch
        death = read_deaths(self._address.deaths).get(epoch or 0)
        if death is not None and epoch != self._judged_epoch:
            self._judged_epoch = epoch
            with self._lock:
                self._verdicts.count(death, self._book.groups)

    def _reroute(self) -> None:
        """Other cores carry on with what is open, as far as they take it. What may have killed this one stays."""
        if self._elsewhere is None or not self._book.open:
            return
        self._judge()
        with self._lock:
            groups = [list(group) for group in self._book.groups.values()]
        for group in groups:
            moved = [s for s in group if s.ending is None and not self._verdicts.is_guilty(s)]
            for sequence in moved:
                self._outbox.tell_held(sequence)
            if moved:
                self._elsewhere(self, moved)

    def _convict(self) -> None:
        """The engine works, so what has killed it is to blame."""
        for sequence, poison in self._verdicts.pronounce():
            if sequence.handle in self._book.open:
                self._observer.poisoned()
                self._endings.finish(sequence, "", "error", None, poison)

    def _end_decided(self) -> None:
        """Sequences whose end the front has decided do not need a core to confirm it when there is none."""
        for sequence in list(self._book.open.values()):
            if sequence.ending is not None:
                self._endings.finish(sequence, "", sequence.ending, None)

    def _give_up(self, error: PageflightError) -> None:
        with self._lock:
            self._lost = error
            self._core.lose()
        self._reroute()
        for sequence in list(self._book.open.values()):
            self._endings.finish(sequence, "", "error", None, self._loss)
        self._settled.set()
