"""From token events to responses: one `Answer` per generation, one `Reply` per Triton request."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pageflight.backend import triton
from pageflight.backend.ledger import Ledger
from pageflight.backend.options import Options
from pageflight.backend.sender_memory import words_of
from pageflight.core import wire
from pageflight.core.errors import PageflightError
from pageflight.core.events import TokenEvent, Usage

_OPTIONAL = frozenset(name for names in wire.RETURN_OPTIONS.values() for name in names)
_IDS = frozenset(("output_ids", "sequence_length"))
_ENSEMBLE_LAST = frozenset(("finish_reason", "num_input_tokens", "num_output_tokens"))
"""Come with the last response to an ensemble, whoever asked for what."""
_PER_TOKEN = _IDS | {"output_log_probs"}


class Reply:
    """A Triton request's way back: responses of its answers, the last of them final, exactly once.

    Safe to use from several threads. `is_cancelled` may be asked at any time.
    """

    def __init__(self, sender: triton.Sender) -> None:
        self._sender = sender
        self._num_open = 1
        # Triton's sender must not be asked anything after its final response. Reentrant: see `_take_over`.
        self._lock = threading.RLock()
        self._ledger: Ledger | None = None
        self._slot: int | None = None
        self._request: weakref.ref[triton.TritonRequest] | None = None

    def keep_in(self, ledger: Ledger, request: triton.TritonRequest) -> None:
        """Have the ledger hold this request until it is over. To be called before anything else is done with it."""
        self._ledger = ledger
        self._slot = ledger.enter(words_of(self._sender))
        # The stub program drops the request object when tritonserver has confirmed that it need not answer any more.
        self._request = weakref.ref(request, self._take_over)

    def expect(self, num_answers: int) -> None:
        """How many answers there will be; before the first response."""
        assert num_answers > 0
        self._num_open = num_answers

    @property
    def is_over(self) -> bool:
        return self._num_open == 0

    def send(self, response: triton.TritonResponse) -> None:
        """A response that is not its answer's last."""
        with self._lock:
            if self._num_open:
                self._sender.send(response, flags=triton.MORE)

    def send_last(self, response: triton.TritonResponse) -> None:
        """The last response of one answer."""
        with self._lock:
            if self._num_open == 0:
                return
            self._num_open -= 1
            if self._num_open:
                self._sender.send(response, flags=triton.MORE)
            else:
                self._strike()
                self._sender.send(response, flags=triton.FINAL)

    def fail(self, error: PageflightError) -> None:
        """End the whole request with an error, whatever is still open of it."""
        with self._lock:
            if self._num_open:
                self._num_open = 0
                self._strike()
                self._sender.send(triton.error_response(error), flags=triton.FINAL)

    def end_empty(self) -> None:
        """End the request without a response: there is nothing to say."""
        with self._lock:
            if self._num_open:
                self._num_open = 0
                self._strike()
                self._sender.send(flags=triton.FINAL)

    def is_cancelled(self) -> bool:
        """Whether the client has gone or called the request off. False once it is over."""
        with self._lock:
            return self._num_open > 0 and self._sender.is_cancelled()

    def _take_over(self, _: object) -> None:
        """On whichever thread drops the request object."""
        with self._lock:
            if self._ledger is not None and self._slot is not None:
                self._ledger.take_over(self._slot)

    def _strike(self) -> None:
        """Before the final response and not after: a request that ends twice brings tritonserver down."""
        if self._ledger is not None:
            self._ledger.leave(self._slot)
            self._ledger = self._slot = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerForm:
    """What the responses of one model look like. `is_batched`: every tensor has a leading batch dimension of 1."""

    outputs: frozenset[str]
    is_batched: bool

    def wanted(self, options: Options, requested: frozenset[str]) -> frozenset[str]:
        """The outputs to send beside the text: those of `return_…` options, and those the request names.

        A request that names no outputs asks, as Triton passes it on, for all of them: that is no wish for the optional
        ones. What a client of an ensemble names does not reach its steps. Such a client gets what is cheap, comes once
        and may have been meant, and Triton leaves out what it did not name.
        """
        asked = {name for flag, names in wire.RETURN_OPTIONS.items() if options.get(flag, False) for name in names}
        if self.is_from_ensemble(requested):
            asked |= _ENSEMBLE_LAST
        elif requested != self.outputs:
            asked |= requested & _OPTIONAL
        return frozenset(asked | (requested & self.outputs & _IDS))

    def is_from_ensemble(self, requested: frozenset[str]) -> bool:
        """Whether a request with these outputs came by way of an ensemble: it is asked for all that the ensemble has a
        use for, which is everything but the ids."""
        return requested != self.outputs and requested == self.outputs - _IDS


@dataclass(slots=True, kw_only=True, eq=False)
class Answer:
    """One generation's responses. Called on the front's response thread (`take`), one event at a time."""

    reply: Reply
    form: AnswerForm
    wanted: frozenset[str]
    num_sequences: int
    batch_index: int | None
    stream: bool
    prefix: str = ""
    """Begins the text of an answer that is not streamed."""
    prefix_ids: tuple[int, ...] = ()
    pad_id: int = 0
    _finals: dict[int, TokenEvent] = field(default_factory=dict)
    _started: set[int] = field(default_factory=set)

    def take(self, event: TokenEvent) -> None:
        """The sink of the generation."""
        if event.final:
            self._finals[event.sequence_index] = event
            is_last = len(self._finals) == self.num_sequences
            if self.stream:
                self._end_stream(event, is_last)
            elif is_last:
                self.reply.send_last(self._collected())
            return
        says_nothing = not event.text and self.wanted.isdisjoint(_PER_TOKEN)
        if says_nothing and event.sequence_index in self._started:
            return  # part of a character or of a stop string; the first token is told even then
        self._started.add(event.sequence_index)
        self.reply.send(triton.response(self._tensors([event])))

    def _end_stream(self, event: TokenEvent, is_last: bool) -> None:
        """A request has at most one error, as its last response: that of each sequence would look like another end."""
        errors = [final.error for final in self._finals.values() if final.error is not None]
        if event.error is None:
            response = triton.response([*self._tensors([event]), *self._last_tensors([event])])
            if is_last and not errors:
                self.reply.send_last(response)
                return
            self.reply.send(response)
        if is_last:
            self.reply.send_last(triton.error_response(errors[0]))

    def _collected(self) -> triton.TritonResponse:
        events = [self._finals[index] for index in sorted(self._finals)]
        for event in events:
            if event.error is not None:
                return triton.error_response(event.error)
        return triton.response([*self._tensors(events), *self._last_tensors(events)])

    def _tensors(self, events: list[TokenEvent]) -> list[triton.TritonTensor]:
        shape = (1, len(events)) if self.form.is_batched else None
        texts = [self.prefix + event.text for event in events] if self.prefix else [event.text for event in events]
        tensors = [triton.strings("text_output", texts, shape=shape)]
        ids = [self.prefix_ids + event.ids for event in events]
        if "output_ids" in self.wanted:
            tensors.append(self._tensor("output_ids", _padded(ids, self.pad_id, np.int32)))
        if "sequence_length" in self.wanted:
            tensors.append(self._tensor("sequence_length", np.array([len(row) for row in ids], dtype=np.int32)))
        if "output_log_probs" in self.wanted:
            rows = _padded([event.log_probs for event in events], 0.0, np.float32)
            tensors.append(self._tensor("output_log_probs", rows))
        if self.num_sequences > 1 and self.stream:
            tensors.append(self._scalar("sequence_index", events[0].sequence_index, np.int32))
        if self.batch_index is not None:
            tensors.append(self._scalar("batch_index", self.batch_index, np.int32))
        return tensors

    def _last_tensors(self, events: list[TokenEvent]) -> list[triton.TritonTensor]:
        wanted = self.wanted
        if not wanted:
            return []
        tensors = []
        usages = [event.usage for event in events if event.usage is not None]
        assert len(usages) == len(events), "a final event without usage"
        if "finish_reason" in wanted:
            shape = (1, len(events)) if self.form.is_batched else None
            tensors.append(triton.strings("finish_reason", [str(e.finish_reason) for e in events], shape=shape))
        if "num_output_tokens" in wanted:
            counts = np.array([usage.num_output_tokens for usage in usages], dtype=np.int32)
            tensors.append(self._tensor("num_output_tokens", counts))
        if "cum_log_probs" in wanted:
            sums = np.array([usage.cum_log_prob for usage in usages], dtype=np.float32)
            tensors.append(self._tensor("cum_log_probs", sums))
        values = {name: (value, dtype) for name, value, dtype in _scalars(usages)}
        tensors += [self._scalar(name, *values[name]) for name in values if name in wanted]
        return tensors

    def _tensor(self, name: str, array: NDArray[Any]) -> triton.TritonTensor:
        return triton.tensor(name, array[np.newaxis] if self.form.is_batched else array)

    def _scalar(self, name: str, value: float, dtype: type[np.generic]) -> triton.TritonTensor:
        return triton.tensor(name, np.full((1, 1) if self.form.is_batched else (1,), value, dtype=dtype))


def _scalars(usages: list[Usage]) -> list[tuple[str, float, type[np.generic]]]:
    """The outputs that are one number for a response, of all its sequences together."""
    first = usages[0]
    reused, new = sum(u.num_reused_blocks for u in usages), sum(u.num_new_blocks for u in usages)
    return [
        ("num_input_tokens", first.num_input_tokens, np.int32),
        ("kv_cache_reused_blocks", reused, np.int32),
        ("kv_cache_alloc_new_blocks", new, np.int32),
        ("kv_cache_alloc_total_blocks", reused + new, np.int32),
        ("total_draft_tokens", 0, np.int32),
        ("total_accepted_draft_tokens", 0, np.int32),
        ("acceptance_rate", 0.0, np.float32),
        ("arrival_time_ns", first.arrival_ns, np.int64),
        ("first_scheduled_time_ns", min(u.first_scheduled_ns for u in usages), np.int64),
        ("first_token_time_ns", min(u.first_token_ns for u in usages), np.int64),
        ("last_token_time_ns", max(u.last_token_ns for u in usages), np.int64),
    ]


def _padded(rows: list[tuple[Any, ...]], fill: float, dtype: type[np.generic]) -> NDArray[Any]:
    """Rows of different lengths as one array."""
    if len(rows) == 1:
        return np.array(rows, dtype=dtype)
    array = np.full((len(rows), max(len(row) for row in rows)), fill, dtype=dtype)
    for index, row in enumerate(rows):
        array[index, : len(row)] = row
    return array
