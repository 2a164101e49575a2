"""What an Observer is told of one sequence: how long its tokens took, and all of it."""

from __future__ import annotations

import time

from pageflight.core.events import TokenEvent
from pageflight.core.plan import Finished
from pageflight.loop.observer import Observer
from pageflight.loop.open_sequence import OpenSequence


def observe_tokens(observer: Observer, sequence: OpenSequence, now_ns: int) -> None:
    """Its fresh ids have come."""
    if sequence.first_token_ns:
        observer.inter_token((now_ns - sequence.last_token_ns) * 1e-9, len(sequence.fresh))
    else:
        sequence.first_token_ns = now_ns
        observer.first_token((now_ns - sequence.arrival_ns) * 1e-9)
    sequence.last_token_ns = now_ns


def observe_end(observer: Observer, sequence: OpenSequence, event: TokenEvent, finished: Finished | None) -> None:
    """`event` is its final one; `finished` the core's word on it, where there is one."""
    assert event.usage is not None and event.finish_reason is not None
    now_ns = time.monotonic_ns()
    scheduled_ns = sequence.scheduled_ns(finished) or sequence.first_token_ns or now_ns
    observer.finished(
        event.finish_reason,
        (now_ns - sequence.arrival_ns) * 1e-9,
        (scheduled_ns - sequence.arrival_ns) * 1e-9,
        event.usage.num_input_tokens,
        event.usage.num_output_tokens,
    )
