"""The fronts of one Triton model instance to all engine cores of its model, as one: which core gets which request.

By default a request goes to the core of the instance that Triton chose. With session affinity those of one conversation
go to one core, by rendezvous hashing (Thaler and Ravishankar, 1998): every instance works out the same core from the
request alone, and one that is lost moves its own conversations only. A core that does not answer is left out; what is
open on one that is lost, or does not come back in time, goes on with another, as it does with a new core of its own.
What one refuses because its queue is full is offered to the next best, and refused when all have.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from pageflight.core.config import SessionAffinity
from pageflight.core.errors import Draining, EngineLost, PageflightError
from pageflight.loop.address import CoreAddress
from pageflight.loop.book import Handles
from pageflight.loop.frames import CoreLimits
from pageflight.loop.front import Front
from pageflight.loop.observer import RoutingObserver, SharedObserver
from pageflight.loop.open_sequence import Generation, OpenSequence, Sink, TextSource
from pageflight.loop.status import read_status

log = logging.getLogger(__name__)

PREFIX_TOKENS = 256
"""Requests whose first so many tokens are alike are of one conversation, where nothing else tells. A shorter beginning
costs little to compute once more."""
EVEN_LOAD = 1.5
"""A core with so many times its even share of what is open here is passed over for another (Mirrokni, Thorup and
Zadimoghaddam, 2016): a beginning that all conversations have must not put them all on one core."""
FEW_OPEN = 8
"""Fewer than that are no load."""
_MEET_S = 2.0
"""What the core of another instance gets to answer a new front."""
_GLANCE_S = 0.2
"""The same while the streams of a core that answers wait for it."""
_LOOK_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How requests are spread. `home`: the core of the own instance; `reroute_after_s`: see `Front`."""

    home: int = 0
    session_affinity: SessionAffinity = "none"
    reroute_after_s: float = 10.0


class Router:
    """Has the interface of a `Front`. Fronts to other cores than the home are made when they are needed first."""

    def __init__(
        self,
        addresses: Sequence[CoreAddress],
        text: TextSource,
        observer: RoutingObserver,
        *,
        routing: Routing,
        response_rate: int | None = None,
        is_ending: Callable[[], bool] = lambda: False,
    ) -> None:
        self._addresses, self._routing, self._observer = tuple(addresses), routing, observer
        self._draining = False
        self._is_ending = is_ending
        self._handles = Handles()
        self._making = threading.Lock()
        self._moving = threading.Lock()
        """Held while sequences go from one front to another: nobody looks for them meanwhile."""
        observers = threading.Lock()
        shares = len(self._addresses) > 1

        def make(number: int) -> Front:
            return Front(
                self._addresses[number],
                text,
                SharedObserver(observer, observers, is_own=number == routing.home) if shares else observer,
                response_rate=response_rate,
                is_ending=is_ending,
                handles=self._handles,
                elsewhere=self._move if shares else None,
                overflow=self._offer if shares else None,
                reroute_after_s=routing.reroute_after_s,
            )

        self._make = make
        self._home = make(routing.home)
        self._fronts = {routing.home: self._home}

    # ---- what a front can do

    @property
    def limits(self) -> CoreLimits:
        """Of the own core, else of another that has answered. Raises EngineLost before one has."""
        for front in self._known():
            if front.has_met:
                return front.limits
        return self._home.limits

    @property
    def is_ready(self) -> bool:
        """Whether a request would be computed at once, by whichever core."""
        is_taking = not self._draining and not self._is_ending()
        return is_taking and any(self._may_answer(number) for number in self._numbers())

    @property
    def home_is_ready(self) -> bool:
        """Whether the core of the own instance takes requests."""
        return self._home.is_ready

    @property
    def num_open(self) -> int:
        """Sequences without their final event."""
        return sum(front.num_open for front in self._known())

    def wait_ready(self, timeout_s: float) -> None:
        """Block until the own core is ready, or another while that is not. Raises like `Front.wait_ready`."""
        until_s, left_s = time.monotonic() + timeout_s, timeout_s
        while left_s > 0 and not self._home.settles(min(_LOOK_S, left_s)):
            if self._finds_another():
                return
            left_s = until_s - time.monotonic()
        if not (self._home.is_lost and self._finds_another()):
            self._home.wait_ready(max(0.0, left_s))

    def submit(self, generation: Generation, sink: Sink, session: str = "") -> int:
        """Like `Front.submit`. `session`: what the client calls the conversation, if anything.

        While no core answers, the request waits for the own one, or for another that is not lost, where there is room.
        """
        if self._draining:
            raise Draining("the server is shutting down and takes no new requests; send it elsewhere")
        if session and self._routing.session_affinity == "correlation":
            generation = replace(generation, session=session)
        for number in self._preferred(generation):
            front = self._reachable(number)
            if front is None:
                continue
            try:
                return self._submit(number, front, generation, sink)
            except EngineLost:  # it went a moment ago
                log.warning("instance %d did not take a request; it goes to another", number)
        waiting = [number for number, front in self._fronts_by_number() if not front.is_lost]
        roomy = (number for number in waiting if self._fronts[number].has_room(generation.sampling.n))
        number = next(roomy, waiting[0] if waiting else self._routing.home)
        return self._submit(number, self._fronts[number], generation, sink)

    def _submit(self, number: int, front: Front, generation: Generation, sink: Sink) -> int:
        generation_id = front.submit(generation, sink)
        if len(self._addresses) > 1:
            self._observer.routed(number)
        return generation_id

    def cancel(self, generation_id: int) -> None:
        """Like `Front.cancel`, whichever core it is on by now."""
        with self._moving:
            for front in self._known():
                front.cancel(generation_id)

    def cut_off(self) -> None:
        """End everything that is open, as `Draining`."""
        with self._moving:
            for front in self._known():
                front.cut_off()

    def close(self, drain_timeout_s: float) -> None:
        """Refuse new requests, give the open ones so long to finish, cut off the rest, and end all threads."""
        self._draining = True
        until_s = time.monotonic() + drain_timeout_s
        closed: set[Front] = set()
        while left := [front for front in self._known() if front not in closed]:  # one may bring about another
            left[0].close(max(0.0, until_s - time.monotonic()))
            closed.add(left[0])

    # ---- which core

    def _preferred(self, generation: Generation) -> list[int]:
        """All cores, the best for this request first."""
        home, affinity = self._routing.home, self._routing.session_affinity
        others = [number for number in self._numbers() if number != home]
        if affinity == "none" or not others:
            return [home, *sorted(others, key=self._num_open)]
        key = generation.session.encode("utf-8", "surrogateescape")
        ranked = ranked_for(key or prefix_key(generation), len(self._addresses))
        total = sum(map(self._num_open, ranked))
        limit = max(FEW_OPEN, EVEN_LOAD * (total + 1) / len(ranked))
        return sorted(ranked, key=lambda number: self._num_open(number) >= limit)  # stable

    def _reachable(self, number: int, patience_s: float = _MEET_S) -> Front | None:
        """The front to a core, if that answers; a new one, within `patience_s`."""
        front = self._fronts.get(number)
        if front is None and self._may_answer(number):
            with self._making:
                front = self._fronts.get(number) or self._make(number)
                self._fronts[number] = front
            try:
                front.wait_ready(patience_s)
            except PageflightError as error:
                log.warning("instance %d does not answer: %s", number, error)
        return front if front is not None and front.answers else None

    def _may_answer(self, number: int) -> bool:
        """Whether a core answers; of one that nothing was asked yet, whether its supervisor says that it is ready."""
        front = self._fronts.get(number)
        if front is not None:
            return front.answers
        status = read_status(self._addresses[number].status)
        return status is not None and status.state == "ready" and status.is_current

    def _finds_another(self) -> bool:
        return any(self._reachable(number) is not None for number in self._numbers() if number != self._routing.home)

    def _move(self, source: Front, sequences: list[OpenSequence]) -> bool:
        """Hand the open sequences of a generation to another core that answers; whether one has taken them. Called by
        the thread that owns them."""
        others = [number for number in self._numbers() if self._fronts.get(number) is not source]
        for number in sorted(others, key=self._num_open):
            front = self._reachable(number)
            if front is None:
                continue
            with self._moving:
                if front.adopt(sequences):
                    source.release(sequences)
                    self._observer.rerouted(len(sequences))
                    log.warning("%d sequences go on in instance %d", len(sequences), number)
                    return True
        return False

    def _offer(self, source: Front, sequences: list[OpenSequence]) -> bool:
        """Hand a generation that its core's queue has no room for to the next best core that has not refused it;
        whether one tries. Called by the thread that owns it."""
        for number in self._preferred(sequences[0].generation):
            front = self._reachable(number, _GLANCE_S)
            if front is None or front is source:
                continue
            with self._moving:
                if front.adopt(sequences):
                    source.release(sequences)
                    self._observer.routed(number)
                    return True
        return False

    def _num_open(self, number: int) -> int:
        front = self._fronts.get(number)
        return front.num_open if front is not None else 0

    def _numbers(self) -> range:
        return range(len(self._addresses))

    def _known(self) -> list[Front]:
        """The home first."""
        return [front for _, front in self._fronts_by_number()]

    def _fronts_by_number(self) -> Iterator[tuple[int, Front]]:
        with self._making:
            return iter(list(self._fronts.items()))


def prefix_key(generation: Generation) -> bytes:
    """What requests of a conversation have in common, as long as its beginning stays."""
    return generation.cache_salt.encode() + b"\0" + array("q", generation.prompt_ids[:PREFIX_TOKENS]).tobytes()


def ranked_for(key: bytes, num_instances: int) -> list[int]:
    """The instances, the best for `key` first. Without one of them the order of the others is the same."""

    def weight(number: int) -> bytes:
        return hashlib.blake2b(key, digest_size=8, salt=number.to_bytes(8, "little")).digest()

    return sorted(range(num_instances), key=weight, reverse=True)
