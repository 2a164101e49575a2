"""One sequence as the front sees it: what it received, what of it may be shown, how it ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pageflight.core.errors import Cancelled, DeadlineExceeded, EngineLost, PageflightError
from pageflight.core.events import TokenEvent, Usage
from pageflight.core.plan import Finished
from pageflight.core.request import Request, SamplingParams
from pageflight.loop.deaths import Suspicion
from pageflight.text.stop import StopMatcher, StopSequences, StopStrings

if TYPE_CHECKING:
    from pageflight.text.detokenizer import Detokenizer

Sink = Callable[[TokenEvent], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One client request.

    `sampling.n` sequences; `sampling.stop_token_ids` already filled in by the caller. `stop` strings are searched in
    the text across token borders and never shown; `stop_ids` are token sequences that end a sequence (TensorRT-LLM's
    `stop_words_list`), their text is not shown either. `stream` False: one event per sequence, with everything.
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    stop_ids: tuple[tuple[int, ...], ...] = ()
    stream: bool = False
    priority: int = 0
    timeout_ms: int | None = None
    tenant: str = ""
    cache_salt: str = ""
    kv_retention_priority: int | None = None
    skip_special_tokens: bool = True
    request_id: str = ""
    session: str = ""
    """What the client calls the conversation that it belongs to, where that decides which instance computes it."""


class TextSource(Protocol):
    """What the front needs of a tokenizer (`text.tokenizer.Tokenizer`)."""

    def detokenizer(self, prompt_ids: tuple[int, ...], *, skip_special_tokens: bool) -> Detokenizer: ...


@dataclass(frozen=True, slots=True, eq=False)
class SharedStops:
    """What ends the sequences of one generation, prepared once."""

    strings: StopStrings | None
    sequences: StopSequences | None
    token_ids: frozenset[int]

    @classmethod
    def of(cls, generation: Generation) -> SharedStops:
        """Raises InvalidArgument for an empty stop string or sequence."""
        return cls(
            StopStrings(generation.stop) if generation.stop else None,
            StopSequences(generation.stop_ids) if generation.stop_ids else None,
            frozenset(generation.sampling.stop_token_ids),
        )


class OpenSequence:
    """State of one sequence between submit and its final event. Owned by the response thread, once submitted."""

    __slots__ = (
        "_detokenizer",
        "_held_ids",
        "_matcher",
        "_parts",
        "_stops",
        "alone",
        "arrival_ns",
        "end_error",
        "ending",
        "epoch_offset_ns",
        "first_token_ns",
        "fresh",
        "fresh_log_probs",
        "generation",
        "handle",
        "index",
        "is_accepted",
        "last_token_ns",
        "leader",
        "output_ids",
        "output_log_probs",
        "refused_by",
        "shown_ids",
        "sink",
        "suspicion",
        "told_ns",
    )

    def __init__(
        self, generation: Generation, sink: Sink, stops: SharedStops, text: TextSource, *, leader: int, index: int
    ) -> None:
        self.generation, self.sink, self.leader, self.index = generation, sink, leader, index
        self.handle = leader + index
        # All times of a sequence are nanoseconds of the monotonic clock; the wall clock may jump between two of them.
        self.arrival_ns = time.monotonic_ns()
        self.epoch_offset_ns = time.time_ns() - self.arrival_ns
        self.output_ids: list[int] = []
        self.output_log_probs: list[float] = []
        self.fresh: list[int] = []
        """Ids received and not yet looked at."""
        self.fresh_log_probs: list[float] = []
        self.shown_ids = 0
        """So many output ids have been delivered."""
        self.first_token_ns = self.last_token_ns = 0
        self.told_ns = 0
        """When the last event was sent."""
        self.ending: str | None = None
        """The reason, once the front has decided the end and only waits for the core to let go."""
        self.end_error: PageflightError | None = None
        """What the client is told of that reason, where it is not what the reason says."""
        self.alone = generation.sampling.n == 1
        """Whether the core knows it as a request of its own."""
        self.is_accepted = False
        """A core has said that it took it in."""
        self.refused_by: set[int] = set()
        """Epochs of cores whose queues were full."""
        self.suspicion = Suspicion()
        self._stops = stops
        self._detokenizer = text.detokenizer(generation.prompt_ids, skip_special_tokens=generation.skip_special_tokens)
        self._matcher = StopMatcher(stops.strings) if stops.strings is not None else None
        self._held_ids: tuple[int, ...] = ()
        self._parts: list[str] = []

    @property
    def arrival_s(self) -> float:
        return self.arrival_ns / 1e9

    @property
    def deadline_s(self) -> float | None:
        timeout_ms = self.generation.timeout_ms
        return None if timeout_ms is None else self.arrival_s + timeout_ms / 1000

    @property
    def is_known(self) -> bool:
        """Whether a core, be it dead, has taken it in: limits of the queue are behind it."""
        return self.is_accepted or bool(self.output_ids) or self.suspicion.points > 0

    def take(self) -> str:
        """Move the fresh ids to the output and return the text they complete. Sets `ending` when a stop is found;
        ids after it are dropped."""
        fresh, self.fresh = self.fresh, []
        if self.fresh_log_probs:
            self.output_log_probs += self.fresh_log_probs
            self.fresh_log_probs = []
        if self._matcher is None and self._stops.sequences is None:
            self.output_ids += fresh
            if fresh[-1] in self._stops.token_ids:
                fresh.pop()  # counts as an output token, is not text
                if not fresh:
                    return ""
            return self._detokenizer.feed(fresh)
        return self._take_searching(fresh)

    def _take_searching(self, fresh: list[int]) -> str:
        stops, min_tokens = self._stops, self.generation.sampling.min_tokens
        shown = ""
        for index in fresh:
            self.output_ids.append(index)
            if index in stops.token_ids:
                break
            is_early = len(self.output_ids) < min_tokens
            length = 0
            visible: tuple[int, ...] = (index,)
            if stops.sequences is not None and not is_early:
                waiting = (*self._held_ids, index)
                self._held_ids, length = stops.sequences.advance(self._held_ids, index)
                visible = waiting[: len(waiting) - (length or len(self._held_ids))]
            text = self._detokenizer.feed(visible) if visible else ""
            shown += text if self._matcher is None or is_early else self._matcher.feed(text)
            if length or (self._matcher is not None and self._matcher.matched is not None):
                self.ending = "stop"
                break
        if self.output_log_probs:
            del self.output_log_probs[len(self.output_ids) :]
        return shown

    def hold(self, text: str) -> None:
        """Keep text until the next event."""
        if text:
            self._parts.append(text)

    def event(self) -> TokenEvent:
        """What has been taken since the last event."""
        start, self.shown_ids = self.shown_ids, len(self.output_ids)
        parts, self._parts = self._parts, []
        return TokenEvent(
            sequence_index=self.index,
            text="".join(parts),
            ids=tuple(self.output_ids[start:]),
            log_probs=tuple(self.output_log_probs[start:]) if self.output_log_probs else (),
        )

    def final_event(
        self, text: str, reason: str, finished: Finished | None, error: PageflightError | None
    ) -> TokenEvent:
        """The one final event. `finished` is the core's word on the sequence, where there is one."""
        if self.ending is None or self.ending == "stop":
            text += self._rest()
            if reason == "length" and self._matcher is not None and self._matcher.matched is not None:
                reason = "stop"
        start, self.shown_ids = self.shown_ids, len(self.output_ids)
        return TokenEvent(
            sequence_index=self.index,
            text="".join(self._parts) + text,
            ids=tuple(self.output_ids[start:]),
            log_probs=tuple(self.output_log_probs[start:]),
            final=True,
            finish_reason=reason,
            error=error or self.end_error or error_for(reason, finished),
            usage=self._usage(finished),
        )

    def ended_by_itself(self) -> str | None:
        """The reason, when the tokens at hand already end the sequence: its core died between them and saying so."""
        if self.output_ids and self.output_ids[-1] in self._stops.token_ids:
            return "stop"
        return "length" if len(self.output_ids) >= self.generation.sampling.max_tokens else None

    def _rest(self) -> str:
        """What waited for more: ids of a stop sequence or characters of a stop string begun, bytes of a character."""
        matcher = self._matcher
        if matcher is not None and matcher.matched is not None:
            return ""
        text = self._detokenizer.feed(self._held_ids) if self.ending is None and self._held_ids else ""
        text += self._detokenizer.flush()
        return text if matcher is None else matcher.feed(text) + matcher.flush()

    def _usage(self, finished: Finished | None) -> Usage:
        counts = {}
        if finished is not None:
            counts = {
                "num_cached_tokens": finished.num_cached_tokens,
                "num_reused_blocks": finished.num_reused_blocks,
                "num_new_blocks": finished.num_new_blocks,
                "first_scheduled_ns": self._epoch_ns(self.scheduled_ns(finished)),
            }
        return Usage(
            num_input_tokens=len(self.generation.prompt_ids),
            num_output_tokens=len(self.output_ids),
            cum_log_prob=sum(self.output_log_probs, 0.0),
            arrival_ns=self._epoch_ns(self.arrival_ns),
            first_token_ns=self._epoch_ns(self.first_token_ns),
            last_token_ns=self._epoch_ns(self.last_token_ns),
            **counts,
        )

    def scheduled_ns(self, finished: Finished | None) -> int:
        """When it first got a row; 0 if it never did, or if nobody said."""
        if finished is None or not finished.first_scheduled_s:
            return 0
        scheduled_ns = max(self.arrival_ns, int(finished.first_scheduled_s * 1e9))
        # A core that took the sequence over knows only when it began itself.
        return min(scheduled_ns, self.first_token_ns) if self.first_token_ns else scheduled_ns

    def _epoch_ns(self, monotonic_ns: int) -> int:
        return monotonic_ns + self.epoch_offset_ns if monotonic_ns else 0


def error_for(reason: str, finished: Finished | None) -> PageflightError | None:
    """The typed error of a finish reason that is an error on the wire."""
    if reason == "cancelled":
        return Cancelled("the request was cancelled")
    if reason == "deadline":
        return DeadlineExceeded("the request's timeout_ms passed before it finished")
    if reason == "error":
        return EngineLost(finished.message if finished is not None else "the engine core was lost")
    return None


def request_of(
    generation: Generation, *, handle: int, arrival_s: float = 0.0, deadline_s: float | None = None
) -> Request:
    """A generation as the scheduler takes it: without what concerns text."""
    return Request(
        handle=handle,
        prompt_ids=generation.prompt_ids,
        sampling=generation.sampling,
        arrival_s=arrival_s,
        deadline_s=deadline_s,
        priority=generation.priority,
        tenant=generation.tenant,
        cache_salt=generation.cache_salt,
        kv_retention_priority=generation.kv_retention_priority,
    )
