"""The front and a succession of cores: what a client gets is what it would have got from one core that never dies."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any
from unittest import mock

from counted import Counted
from front_harness import Collector, NumberText
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from line import Line, LineMailbox
from loop_machine import VOCAB_SIZE, make_core, parts_of
from scheduler_machine import SETTINGS, arranged

from pageflight.core.errors import Cancelled, DeadlineExceeded, InvalidArgument, QueueFull
from pageflight.core.request import SamplingParams
from pageflight.loop.address import private_address
from pageflight.loop.client import Disconnected
from pageflight.loop.clock import ManualClock
from pageflight.loop.engine_loop import EngineLoop
from pageflight.loop.frames import PROTOCOL, CoreLimits, Hello
from pageflight.loop.front import Front
from pageflight.loop.observer import SilentObserver
from pageflight.loop.open_sequence import Generation
from pageflight.runners.fake import fake_continuation, fake_log_prob

GENERATIONS = st.builds(
    Generation,
    prompt_ids=st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple),
    sampling=st.builds(
        SamplingParams,
        max_tokens=st.integers(1, 18),
        n=st.sampled_from([1, 1, 2, 3]),
        temperature=st.sampled_from([0.0, 1.0]),
        seed=st.integers(0, 3),
        stop_token_ids=st.sampled_from([(), (), (0,), (3, 4)]),
        log_probs=st.booleans(),
    ),
    stop=st.sampled_from([(), (), ("7,",), ("1,2", "10,"), (",5,",)]),
    stop_ids=st.sampled_from([(), (), ((6,), (8, 9))]),
    stream=st.booleans(),
    priority=st.sampled_from([0, 0, 1]),
    timeout_ms=st.sampled_from([None, None, None, 500]),
    tenant=st.sampled_from(["", "a"]),
)


@dataclass(eq=False)
class Asked:
    generation: Generation
    sink: Collector
    number: int
    is_cancelled: bool = False


def expected_answer(generation: Generation, index: int) -> tuple[list[int], str, str]:
    """Ids, text and reason of an answer that nothing disturbs, read off the whole of it."""
    ids = fake_continuation(generation.prompt_ids, generation.sampling, sequence_index=index, vocab_size=VOCAB_SIZE)
    text = ""
    for count, token in enumerate(ids, 1):
        if token in generation.sampling.stop_token_ids:
            return ids[:count], text, "stop"
        for word in generation.stop_ids:
            if tuple(ids[max(0, count - len(word)) : count]) == word:
                return ids[:count], "".join(f"{i}," for i in ids[: count - len(word)]), "stop"
        text += f"{token},"
        found = [text.find(stop) for stop in generation.stop if stop in text]
        if found:
            return ids[:count], text[: min(found)], "stop"
    return ids, text, "length"


class FrontMachine(Counted):
    """Streams survive any number of deaths, at any moment, with any part of what was said already heard."""

    @initialize(
        settings=st.fixed_dictionaries(SETTINGS),
        ahead=st.sampled_from([None, False, True]),
        response_rate=st.sampled_from([None, None, 50]),
    )
    def build(self, settings: dict[str, Any], ahead: bool | None, response_rate: int | None) -> None:
        self.config, self.kv = parts_of(arranged(settings))
        self.ahead, self.clock = ahead, ManualClock(time.monotonic())
        self.line, self.epoch = Line(), 0
        with mock.patch("pageflight.loop.front.CoreClient", lambda address: self.line):
            self.front = Front(private_address(), NumberText(), SilentObserver(), response_rate=response_rate)
        self.asked: list[Asked] = []
        self.mailbox: LineMailbox | None = None
        self.begin_core()

    @precondition(lambda self: self.mailbox is None)
    @rule()
    def begin_core(self) -> None:
        """A core takes over, as after the supervisor has started it."""
        self.epoch += 1
        self.mailbox = LineMailbox(self.line, self.epoch)
        self.scheduler, runner = make_core(self.config, self.kv)
        self.loop = EngineLoop(
            scheduler=self.scheduler, runner=runner, mailbox=self.mailbox, clock=self.clock, ahead=self.ahead
        )
        limits = CoreLimits(
            max_model_len=self.config.max_model_len,
            num_blocks=self.kv.num_blocks,
            block_size=self.kv.block_size,
            vocab_size=VOCAB_SIZE,
            max_num_seqs=self.config.max_num_seqs,
            max_queue_size=self.config.max_queue_size,
        )
        self.line.deliver(Hello(PROTOCOL, self.epoch, 1, limits, 0))

    @rule(generation=GENERATIONS)
    def ask(self, generation: Generation) -> None:
        sink = Collector(generation.sampling.n)
        try:
            number = self.front.submit(generation, sink)
        except InvalidArgument:
            return
        except QueueFull:
            assert self.mailbox is None or not self.front.is_ready, "a core that answers keeps its own limits"
            return
        self.asked.append(Asked(generation, sink, number))

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        one = data.draw(st.sampled_from(self.asked))
        one.is_cancelled = True
        self.front.cancel(one.number)
        self.line.settle()

    @rule(seconds=st.sampled_from([0.01, 0.3, 1.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @precondition(lambda self: self.mailbox is not None)
    @rule(count=st.integers(1, 4), num_heard=st.sampled_from([0, 1, 100, 100]))
    def step(self, count: int, num_heard: int) -> None:
        for _ in range(count):
            if self.scheduler.has_work or self.mailbox.has_commands:
                self.loop.step()
        self.mailbox.deliver(num_heard)

    @precondition(lambda self: self.mailbox is not None)
    @rule(num_heard=st.integers(0, 3))
    def die(self, num_heard: int) -> None:
        """Some of what the core said still arrives; the rest, and what it was told last, is lost."""
        self.mailbox.deliver(num_heard)
        self.mailbox = None
        self.line.commands.clear()
        self.line.deliver(Disconnected())

    @precondition(lambda self: hasattr(self, "front"))
    @invariant()
    def nobody_hears_anything_wrong(self) -> None:
        for one in self.asked:
            assert not one.sink.problems, one.sink.problems
            for index in range(one.generation.sampling.n):
                ids, text, _reason = expected_answer(one.generation, index)
                got = one.sink.ids(index)
                assert list(got) == ids[: len(got)], f"{got} instead of {ids}"
                assert text.startswith(one.sink.text(index)), f"{one.sink.text(index)!r} instead of {text!r}"

    def teardown(self) -> None:
        if not hasattr(self, "front"):
            return
        if self.mailbox is None:
            self.begin_core()
        for _ in range(2000):
            if not self.front.num_open:
                break
            self.loop.step()
            self.mailbox.deliver(100)
        assert not self.front.num_open, "requests are open although the core has nothing to do"
        self.front.close(0.0)
        for one in self.asked:
            self.check_end(one)
        self.scheduler.check()

    def check_end(self, one: Asked) -> None:
        """Each sequence has one final event, and its answer is whole unless somebody cut it."""
        assert sorted(one.sink.finals) == list(range(one.generation.sampling.n))
        for index, final in one.sink.finals.items():
            if final.error is not None:
                is_late = one.generation.timeout_ms is not None and isinstance(final.error, DeadlineExceeded)
                is_unwanted = one.is_cancelled and isinstance(final.error, Cancelled)
                is_refused = isinstance(final.error, QueueFull | InvalidArgument)
                assert is_late or is_unwanted or is_refused, final.error
                is_accepted = one.sink.ids(index) or one.number + index in self.line.confirmed
                assert not (is_refused and is_accepted), f"accepted, taken over and then refused: {final.error}"
                continue
            ids, text, reason = expected_answer(one.generation, index)
            assert (list(one.sink.ids(index)), one.sink.text(index)) == (ids, text)
            assert final.finish_reason == reason
            assert final.usage is not None and final.usage.num_output_tokens == len(ids)
            if one.generation.sampling.log_probs:
                events = [event for event in one.sink.events if event.sequence_index == index]
                got = [value for event in events for value in event.log_probs]
                assert got == [fake_log_prob(token) for token in ids]
