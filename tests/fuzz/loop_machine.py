"""The whole loop: commands in, events out, and cores that die in between."""

from __future__ import annotations

from typing import Any

from counted import Counted
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from scheduler_machine import SETTINGS, TENANTS, arranged

from pageflight.core.config import KVConfig, SchedulerConfig
from pageflight.core.request import Request, SamplingParams
from pageflight.core.tenants import Tenants
from pageflight.loop.clock import ManualClock
from pageflight.loop.engine_loop import Cancel, Drain, EngineLoop, Shutdown, Submit
from pageflight.loop.in_memory import InMemoryMailbox
from pageflight.runners.base import RunnerLimits
from pageflight.runners.deep_fake import DeepFakeRunner
from pageflight.runners.fake import FakeRunner, fake_continuation
from pageflight.sched.scheduler import Scheduler
from pageflight.sched.trials import TRIAL_TOKENS

VOCAB_SIZE = 11
KV_FIELDS = KVConfig.__dataclass_fields__

REQUESTS = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(0, 2), min_size=0, max_size=20),
        "max_tokens": st.integers(0, 16),
        "n": st.sampled_from([1, 1, 2]),
        "temperature": st.sampled_from([0.0, 0.7]),
        "patience_s": st.sampled_from([None, None, 3.0]),
        "stop": st.sampled_from([(), (4, 5)]),
        "priority": st.sampled_from([0, 0, 1]),
        "tenant": st.sampled_from(["", "a", "b"]),
    }
)


def parts_of(settings: dict[str, Any]) -> tuple[SchedulerConfig, KVConfig]:
    kv = KVConfig(**{name: value for name, value in settings.items() if name in KV_FIELDS})
    return SchedulerConfig(**{name: value for name, value in settings.items() if name not in KV_FIELDS}), kv


def make_core(config: SchedulerConfig, kv: KVConfig) -> tuple[Scheduler, FakeRunner]:
    scheduler = Scheduler(config, kv, vocab_size=VOCAB_SIZE)
    limits = RunnerLimits(
        num_blocks=kv.num_blocks,
        num_host_blocks=kv.num_host_blocks,
        block_size=kv.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=scheduler.limits.max_sequence_len,
        vocab_size=VOCAB_SIZE,
    )
    return scheduler, FakeRunner(limits)


class LoopMachine(Counted):
    """Every request that is taken ends once with the tokens it has alone, whatever is cancelled, dies or is drained."""

    @initialize(
        settings=st.fixed_dictionaries(SETTINGS),
        ahead=st.sampled_from([None, False, True]),
        depth=st.sampled_from([1, 2]),
    )
    def build(self, settings: dict[str, Any], ahead: bool | None, depth: int) -> None:
        self.config, self.kv = parts_of(arranged(settings))
        self.depth = depth
        self.ahead, self.clock = ahead, ManualClock()
        self.requests: dict[int, Request] = {}  # by sequence
        self.output_ids: dict[int, list[int]] = {}
        self.reasons: dict[int, str] = {}
        self.is_refused: set[int] = set()
        self.is_accepted: set[int] = set()
        self.next_handle = 0
        self.begin_core()

    def begin_core(self) -> None:
        self.mailbox = InMemoryMailbox()
        self.scheduler, fake = make_core(self.config, self.kv)
        runner = fake if self.depth == 1 else DeepFakeRunner(fake.limits, self.depth)
        self.loop = EngineLoop(
            scheduler=self.scheduler, runner=runner, mailbox=self.mailbox, clock=self.clock, ahead=self.ahead
        )

    @rule(wish=REQUESTS)
    def submit(self, wish: dict[str, Any]) -> None:
        sampling = SamplingParams(
            max_tokens=wish["max_tokens"],
            n=wish["n"],
            temperature=wish["temperature"],
            stop_token_ids=wish["stop"],
        )
        patience_s = wish["patience_s"]
        request = Request(
            handle=self.next_handle,
            prompt_ids=tuple(wish["prompt"]),
            sampling=sampling,
            arrival_s=self.clock(),
            deadline_s=None if patience_s is None else self.clock() + patience_s,
            priority=wish["priority"],
            tenant=wish["tenant"],
        )
        self.next_handle += sampling.n
        for handle in range(request.handle, self.next_handle):
            self.requests[handle], self.output_ids[handle] = request, []
        self.mailbox.send(Submit(request))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), by_client=st.booleans())
    def cancel(self, data: Any, by_client: bool) -> None:
        self.mailbox.send(Cancel(data.draw(st.integers(0, self.next_handle)), by_client))

    @rule(seconds=st.sampled_from([0.01, 1.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(tenants=TENANTS)
    def change_tenants(self, tenants: Tenants) -> None:
        self.scheduler.set_tenants(tenants)

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            if self.scheduler.has_work or self.mailbox.has_commands:
                self.loop.step()
        self.hear()
        if not self.mailbox.has_commands:
            self.is_accepted = self.requests.keys() - self.is_refused

    @rule(trial_tokens=st.sampled_from([0, TRIAL_TOKENS, 7]))
    def die(self, trial_tokens: int) -> None:
        """What was not published is lost; the next core takes over from what was, as a front would ask it to."""
        self.hear()
        self.begin_core()
        for handle, request in self.requests.items():
            if handle in self.reasons or handle in self.is_refused:
                continue
            sampling = request.sampling
            again = Request(
                handle=handle,
                prompt_ids=request.prompt_ids,
                sampling=SamplingParams(
                    max_tokens=sampling.max_tokens,
                    temperature=sampling.temperature,
                    stop_token_ids=sampling.stop_token_ids,
                ),
                arrival_s=request.arrival_s,
                deadline_s=request.deadline_s,
                priority=request.priority,
                tenant=request.tenant,
                sequence_index=handle - request.handle,
                output_ids=tuple(self.output_ids[handle]),
                trial_tokens=trial_tokens,
                is_taken_over=handle in self.is_accepted,
            )
            self.mailbox.send(Submit(again))

    def hear(self) -> None:
        """Read what the core has published and refused."""
        for handle, _error in self.mailbox.take_rejections():
            first = self.requests[handle]
            alone = handle != first.handle or self.output_ids[handle]
            for index in range(1 if alone else first.sampling.n):
                assert handle + index not in self.reasons
                assert handle + index not in self.is_accepted, "accepted, taken over and then refused"
                self.is_refused.add(handle + index)
        for events in self.mailbox.take_events():
            for handle, token in zip(events.handles.tolist(), events.ids.tolist(), strict=True):
                assert handle not in self.reasons, "a token after the final event"
                assert handle not in self.is_refused, "a token of a refused request"
                self.output_ids[handle].append(token)
            for ending in events.finished:
                assert ending.handle not in self.reasons, "two final events"
                self.reasons[ending.handle] = ending.reason

    @precondition(lambda self: hasattr(self, "scheduler"))
    @invariant()
    def everything_fits_together(self) -> None:
        self.scheduler.check()
        for handle, token_ids in self.output_ids.items():
            assert self.expected(handle)[: len(token_ids)] == token_ids

    def expected(self, handle: int) -> list[int]:
        request = self.requests[handle]
        return fake_continuation(
            request.prompt_ids,
            request.sampling,
            sequence_index=handle - request.handle,
            vocab_size=VOCAB_SIZE,
        )

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        is_hasty = self.next_handle % 4 == 3
        self.mailbox.send(Shutdown() if is_hasty else Drain())
        self.loop.run()
        self.loop._publish_endings()  # a loop that was shut down leaves them to its owner
        self.hear()
        self.scheduler.check()
        assert self.scheduler.space.pool.num_free == self.kv.num_blocks or is_hasty
        for handle in self.requests:
            if handle not in self.is_refused:
                whole = self.reasons[handle] in ("stop", "length")
                assert not whole or self.output_ids[handle] == self.expected(handle)
                assert whole or self.reasons[handle] in ("cancelled", "deadline")
