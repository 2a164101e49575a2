"""Helpers of the front's tests: a text that can be read, a sink that checks the promise of one final event."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig
from pageflight.core.events import TokenEvent
from pageflight.core.request import SamplingParams
from pageflight.core.stats import CoreStats
from pageflight.loop.core_process import CoreSpec, FakeEngine
from pageflight.loop.front import Front, Generation

WAIT_S = 60.0  # for machines that are busy with other things
CONFIG = EngineConfig(
    kv=KVConfig(num_blocks=256, block_size=16),
    scheduler=SchedulerConfig(max_num_tokens=256, max_num_seqs=64, max_model_len=1024),
)
SLOW = CoreSpec(config=CONFIG, fake=FakeEngine(step_s=0.004))
FAST = CoreSpec(config=CONFIG, fake=FakeEngine(kind="instant"))


class NumberText:
    """Each id is shown as its number and a comma, so that text and ids tell the same."""

    def detokenizer(self, prompt_ids: Sequence[int], *, skip_special_tokens: bool) -> NumberText:
        return self

    def feed(self, ids: Sequence[int]) -> str:
        return "".join(f"{index}," for index in ids)

    def flush(self) -> str:
        return ""


class Collector:
    """A sink that keeps every event and refuses a second final one of a sequence."""

    def __init__(self, count: int = 1) -> None:
        self.events: list[TokenEvent] = []
        self.finals: dict[int, TokenEvent] = {}
        self.problems: list[str] = []
        self._count = count
        self._changed = threading.Condition()

    def __call__(self, event: TokenEvent) -> None:
        with self._changed:
            if event.sequence_index in self.finals:
                self.problems.append(f"event after the final one: {event}")
            self.events.append(event)
            if event.final:
                self.finals[event.sequence_index] = event
            self._changed.notify_all()

    def wait(self, until: Callable[[], bool] | None = None) -> Collector:
        """Until all sequences are final, or `until` holds."""
        with self._changed:
            reached = self._changed.wait_for(until or (lambda: len(self.finals) == self._count), WAIT_S)
        assert reached, f"only {len(self.events)} events, finals {self.finals}"
        assert not self.problems, self.problems
        return self

    def ids(self, index: int = 0) -> tuple[int, ...]:
        return tuple(i for event in self.events if event.sequence_index == index for i in event.ids)

    def text(self, index: int = 0) -> str:
        return "".join(event.text for event in self.events if event.sequence_index == index)

    @property
    def num_ids(self) -> int:
        return sum(len(event.ids) for event in self.events)


@dataclass
class Recorder:
    """An Observer that keeps everything."""

    num_first: int = 0
    inter: list[int] = field(default_factory=list)
    ends: list[tuple[str, int, int]] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    stats: list[CoreStats] = field(default_factory=list)
    restarts: list[tuple[int, int]] = field(default_factory=list)
    """Restarts and replayed sequences, once for every core that took over."""
    num_poisoned: int = 0
    instances: list[int] = field(default_factory=list)
    """Where each request went, of several."""
    num_rerouted: int = 0

    def first_token(self, seconds: float) -> None:
        assert seconds >= 0
        self.num_first += 1

    def inter_token(self, seconds: float, count: int) -> None:
        self.inter.append(count)

    def finished(
        self, reason: str, end_to_end_s: float, queue_s: float, num_input_tokens: int, num_output_tokens: int
    ) -> None:
        assert 0 <= queue_s <= end_to_end_s
        self.ends.append((reason, num_input_tokens, num_output_tokens))

    def refused(self, reason: str) -> None:
        self.refusals.append(reason)

    def core_stats(self, stats: CoreStats) -> None:
        self.stats.append(stats)

    def restarted(self, num_restarts: int, num_replayed: int) -> None:
        self.restarts.append((num_restarts, num_replayed))

    def poisoned(self) -> None:
        self.num_poisoned += 1

    def routed(self, instance: int) -> None:
        self.instances.append(instance)

    def rerouted(self, num_sequences: int) -> None:
        self.num_rerouted += num_sequences


def generation(
    prompt: Sequence[int] = (3, 1, 4, 1, 5), *, max_tokens: int = 30, stream: bool = True, **wishes: object
) -> Generation:
    """A generation; wishes that SamplingParams knows go there."""
    known = SamplingParams.__dataclass_fields__
    sampling = SamplingParams(max_tokens=max_tokens, **{k: v for k, v in wishes.items() if k in known})
    rest = {k: v for k, v in wishes.items() if k not in known}
    return Generation(prompt_ids=tuple(prompt), sampling=sampling, stream=stream, **rest)


def run(front: Front, wanted: Generation) -> Collector:
    sink = Collector(wanted.sampling.n)
    front.submit(wanted, sink)
    return sink.wait()


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait for another process; fails only after a long time."""
    until_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until_s, f"never: {what}"
        time.sleep(0.01)


def is_all_free(stats: CoreStats) -> bool:
    return not stats.num_running and not stats.num_waiting and stats.num_free_blocks == stats.num_blocks
