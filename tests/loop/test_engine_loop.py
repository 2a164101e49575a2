from __future__ import annotations

import threading

import pytest

from pageflight.core.config import KVConfig, SchedulerConfig
from pageflight.core.errors import Draining, InvalidArgument
from pageflight.core.plan import StepEvents, StepPlan, StepResult
from pageflight.core.request import Request, SamplingParams
from pageflight.core.stats import CoreStats
from pageflight.loop.clock import ManualClock
from pageflight.loop.engine_loop import LINGER_LIMIT_S, Cancel, Command, Drain, EngineLoop, NoTrace, Shutdown, Submit
from pageflight.loop.in_memory import InMemoryMailbox
from pageflight.runners.base import RunnerLimits
from pageflight.runners.deep_fake import DeepFakeRunner
from pageflight.runners.fake import FakeRunner, InstantRunner, fake_continuation
from pageflight.sched.scheduler import Scheduler

VOCAB_SIZE = 50
CONFIG = SchedulerConfig(max_num_tokens=32, max_num_seqs=4, max_model_len=64)
KV = KVConfig(block_size=4, num_blocks=64)
LIMITS = RunnerLimits(num_blocks=64, block_size=4, max_num_seqs=4, max_model_len=64, vocab_size=VOCAB_SIZE)


class Scene:
    """A loop on a FakeRunner in this thread; `log` records the order of what it does."""

    def __init__(self, runner: FakeRunner | DeepFakeRunner | None = None) -> None:
        self.log: list[str] = []
        self.mailbox = InMemoryMailbox()
        self.clock = ManualClock()
        self.stats: list[CoreStats] = []
        self.runner = runner or FakeRunner(LIMITS)
        self.loop = EngineLoop(
            scheduler=Scheduler(CONFIG, KV, vocab_size=VOCAB_SIZE),
            runner=self.runner,
            mailbox=self.mailbox,
            clock=self.clock,
            report=self.stats.append,
            report_interval_s=1.0,
        )

    def submit(self, handle: int, **sampling: int) -> Request:
        request = Request(handle=handle, prompt_ids=(1, 2, handle), sampling=SamplingParams(**sampling))  # type: ignore[arg-type]
        self.mailbox.send(Submit(request))
        return request

    def until_idle(self) -> list[StepEvents]:
        """Step until the loop would wait for a command: nothing is open, everything is published."""
        self.loop.step()
        while self.loop._patience_s() == 0.0 and not self.loop.is_finished:
            self.loop.step()
        return self.mailbox.take_events()


def ids_of(events: list[StepEvents], handle: int) -> list[int]:
    return [int(i) for event in events for h, i in zip(event.handles, event.ids, strict=True) if h == handle]


def steps_of(runner: FakeRunner | DeepFakeRunner) -> list[str]:
    """What the runner is asked from now on, as it goes."""
    log: list[str] = []
    submit, collect = runner.submit, runner.collect

    def logged_submit(plan: StepPlan) -> None:
        log.append(f"submit {plan.step}")
        submit(plan)

    def logged_collect() -> StepResult:
        result = collect()
        log.append(f"collect {result.step}")
        return result

    runner.submit, runner.collect = logged_submit, logged_collect  # type: ignore[method-assign]
    return log


def test_tokens_come_out_in_order_and_each_sequence_ends_once() -> None:
    scene = Scene()
    requests = [scene.submit(handle, max_tokens=3 + handle) for handle in range(3)]
    events = scene.until_idle()
    for request in requests:
        expected = fake_continuation(request.prompt_ids, request.sampling, vocab_size=VOCAB_SIZE)
        assert ids_of(events, request.handle) == expected
    assert sorted(ending.handle for event in events for ending in event.finished) == [0, 1, 2]


def test_events_of_a_step_go_out_while_the_next_one_runs() -> None:
    """Sending before submitting left the model idle while the sockets were busy."""
    scene = Scene()
    log, publish = steps_of(scene.runner), scene.mailbox.publish

    def logged_publish(events: StepEvents) -> None:
        log.append(f"publish {events.step}")
        publish(events)

    scene.mailbox.publish = logged_publish  # type: ignore[method-assign]
    scene.submit(0, max_tokens=2)
    scene.until_idle()
    assert log == ["submit 0", "collect 0", "submit 1", "publish 0", "collect 1", "publish 1"]


def test_a_runner_that_takes_two_steps_always_has_the_next_one() -> None:
    """A GPU stood idle from the end of a step until its ids had been settled and the next step planned."""
    scene = Scene(runner := DeepFakeRunner(LIMITS))
    log = steps_of(runner)
    requests = [scene.submit(handle, max_tokens=3 + handle) for handle in range(2)]
    events = scene.until_idle()
    assert log[:6] == ["submit 0", "submit 1", "collect 0", "submit 2", "collect 1", "submit 3"]
    assert log[-1] == f"collect {len(log) // 2 - 1}"
    for request in requests:
        expected = fake_continuation(request.prompt_ids, request.sampling, vocab_size=VOCAB_SIZE)
        assert ids_of(events, request.handle) == expected


def test_steps_of_a_trial_are_alone_in_flight() -> None:
    """The last step of a trial had a step of everybody behind it: who brought the core down could not be told."""
    scene = Scene(runner := DeepFakeRunner(LIMITS))
    log = steps_of(runner)
    plan_step, trials = scene.loop.scheduler.plan, set[int]()

    def noted_plan(now_s: float) -> StepPlan | None:
        is_trial = scene.loop.scheduler.accused is not None
        plan = plan_step(now_s)
        if plan is not None and is_trial:
            trials.add(plan.step)
        return plan

    scene.loop.scheduler.plan = noted_plan  # type: ignore[method-assign]
    scene.submit(0, max_tokens=9)
    accused = Request(handle=1, prompt_ids=(4, 5), sampling=SamplingParams(max_tokens=6), trial_tokens=3)
    scene.mailbox.send(Submit(accused))
    events = scene.until_idle()
    assert ids_of(events, 1) == fake_continuation(accused.prompt_ids, accused.sampling, vocab_size=VOCAB_SIZE)
    assert len(trials) == 3
    for step in trials:
        at = log.index(f"submit {step}")
        assert log[at + 1] == f"collect {step}"
        kinds = [entry.split()[0] for entry in log[:at]]
        assert kinds.count("submit") == kinds.count("collect"), "a step of others was still under way"


def test_a_row_that_is_taken_anew_is_traced_under_both_names() -> None:
    """Two steps in flight, and the first of them computes a sequence that has lost its row to another since."""
    scene = Scene(DeepFakeRunner(LIMITS))
    begun: list[set[int]] = []

    class Traced(NoTrace):
        def begin(self, handles_R, rows_S) -> None:  # type: ignore[no-untyped-def]
            begun.append(set(handles_R[rows_S].tolist()))

    scene.loop._trace = Traced()
    for handle in range(6):  # four rows
        scene.submit(handle, max_tokens=3)
    events = scene.until_idle()
    assert sum(len(event.finished) for event in events) == 6
    assert {0, 1, 2, 3} <= begun[0] and max(len(names) for names in begun) >= 4
    assert {4, 5} <= set().union(*begun)


def test_a_refused_request_gets_its_error_and_no_event() -> None:
    """An over-long request was logged and dropped; its client waited for ever."""
    scene = Scene()
    scene.submit(5, max_tokens=1000)
    events = scene.until_idle()
    ((handle, error),) = scene.mailbox.take_rejections()
    assert handle == 5 and isinstance(error, InvalidArgument) and events == []


def test_a_cancelled_sequence_ends_at_once_while_others_go_on() -> None:
    scene = Scene()
    scene.submit(0, max_tokens=20)
    scene.submit(1, max_tokens=5)
    for _ in range(3):
        scene.loop.step()
    free = scene.loop.scheduler.stats().num_free_blocks
    scene.mailbox.send(Cancel(0), Cancel(0), Cancel(77))
    scene.loop.step()
    assert scene.loop.scheduler.stats().num_free_blocks > free
    events = scene.until_idle()
    endings = {ending.handle: ending.reason for event in events for ending in event.finished}
    assert endings == {0: "cancelled", 1: "length"}
    assert len(ids_of(events, 0)) == 3, "what was sampled before the cancel is delivered before its final event"
    assert len(ids_of(events, 1)) == 5


def test_a_deadline_ends_a_sequence_between_its_tokens() -> None:
    scene = Scene()
    request = Request(handle=0, prompt_ids=(1,), sampling=SamplingParams(max_tokens=50), deadline_s=10.0)
    scene.mailbox.send(Submit(request))
    scene.loop.step()
    scene.clock.advance(10.0)
    (last,) = [ending for event in scene.until_idle() for ending in event.finished]
    assert (last.reason, last.num_output_tokens) == ("deadline", 1)


def test_drain_finishes_open_sequences_refuses_new_ones_and_leaves() -> None:
    scene = Scene()
    scene.submit(0, max_tokens=4)
    scene.mailbox.send(Drain())
    scene.submit(1, max_tokens=4)
    scene.loop.run()
    events = scene.mailbox.take_events()
    assert len(ids_of(events, 0)) == 4
    ((handle, error),) = scene.mailbox.take_rejections()
    assert handle == 1 and isinstance(error, Draining)


def test_shutdown_ends_every_open_sequence_with_one_final_event() -> None:
    """The core left and its clients' streams stayed open."""
    scene = Scene()
    for handle in range(6):
        scene.submit(handle, max_tokens=40)
    scene.loop.step()
    scene.mailbox.send(Shutdown())
    scene.loop.run()
    endings = [ending for event in scene.mailbox.take_events() for ending in event.finished]
    assert sorted(ending.handle for ending in endings) == list(range(6))
    assert {ending.reason for ending in endings} == {"cancelled"}


def test_an_idle_loop_waits_and_wakes_for_a_command() -> None:
    """A loop that polled for work took half of the processor from the model."""
    scene = Scene()
    waits: list[float | None] = []
    receive = scene.mailbox.receive
    num_woken = threading.Semaphore(0)

    def logged_receive(timeout_s: float | None) -> list[Command]:
        waits.append(timeout_s)
        commands = list(receive(timeout_s))
        num_woken.release()
        return commands

    scene.mailbox.receive = logged_receive  # type: ignore[method-assign]
    thread = threading.Thread(target=scene.loop.run)
    thread.start()
    assert not num_woken.acquire(timeout=0.2), "it came back without a command"
    scene.submit(0, max_tokens=2)
    scene.mailbox.send(Drain())
    thread.join(timeout=10)
    assert not thread.is_alive() and waits[0] is None and set(waits[1:]) == {0.0}
    assert len(ids_of(scene.mailbox.take_events(), 0)) == 2


def test_statistics_come_at_their_interval_and_when_the_loop_goes_idle() -> None:
    """The last figures before an idle night showed running sequences until morning."""
    scene = Scene()
    scene.submit(0, max_tokens=6)
    scene.until_idle()
    assert [stats.num_running for stats in scene.stats] == [1, 0]
    assert scene.stats[-1].generated_tokens == 6 and scene.stats[-1].num_free_blocks == KV.num_blocks
    scene.submit(1, max_tokens=6)
    for _ in range(3):
        scene.clock.advance(1.5)
        scene.loop.step()
    assert len(scene.stats) == 5


def test_a_runner_that_raises_ends_the_loop() -> None:
    """Swallowed, the same broken step came again for ever; the owner of the core decides what follows."""
    scene = Scene()

    def broken() -> StepResult:
        raise RuntimeError("device lost")

    scene.runner.collect = broken  # type: ignore[method-assign]
    scene.submit(0, max_tokens=6)
    with pytest.raises(RuntimeError, match="device lost"):
        scene.loop.run()


def test_the_instant_runner_walks_through_the_ids_and_ends_by_length() -> None:
    mailbox = InMemoryMailbox()
    loop = EngineLoop(
        scheduler=Scheduler(CONFIG, KV, vocab_size=VOCAB_SIZE),
        runner=InstantRunner(LIMITS, first_id=10),
        mailbox=mailbox,
        clock=ManualClock(),
    )
    for handle in range(6):
        sampling = SamplingParams(max_tokens=30, stop_token_ids=(3,))
        mailbox.send(Submit(Request(handle=handle, prompt_ids=(1,) * 9, sampling=sampling)))
    mailbox.send(Drain())
    loop.run()
    events = mailbox.take_events()
    for handle in range(6):
        ids = ids_of(events, handle)
        assert len(ids) == 30 and min(ids) >= 10 and len(set(ids)) == 30


class ClosedLoopMailbox(InMemoryMailbox):
    """A client that sends its next request when its last one has ended, and notes how long the loop would wait."""

    def __init__(self, num_requests: int) -> None:
        super().__init__()
        self.timeouts_s: list[float | None] = []
        self._left = num_requests
        self.send_next()

    def send_next(self) -> None:
        if self._left:
            self._left -= 1
            self.send(Submit(Request(handle=self._left, prompt_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=3))))

    def receive(self, timeout_s: float | None):  # type: ignore[no-untyped-def]
        self.timeouts_s.append(timeout_s)
        return super().receive(0.0)

    def publish(self, events) -> None:  # type: ignore[no-untyped-def]
        super().publish(events)
        for _ in events.finished:
            self.send_next()


def test_the_successor_of_a_request_that_ended_joins_the_very_next_step() -> None:
    """It arrived just after the next step had begun, and its row stood empty for all of that step."""
    mailbox, clock = ClosedLoopMailbox(4), ManualClock(0.0)
    limits = RunnerLimits(num_blocks=64, block_size=4, max_num_seqs=8, max_model_len=64, vocab_size=97)

    class SlowRunner(FakeRunner):
        def collect(self) -> StepResult:
            clock.advance(1.0)
            return super().collect()

    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=8, max_model_len=64), KVConfig(num_blocks=64, block_size=4), vocab_size=97
    )
    loop = EngineLoop(scheduler=scheduler, runner=SlowRunner(limits), mailbox=mailbox, clock=clock)
    for _ in range(12):  # four requests of three steps each, and no step in between
        loop.step()
    assert not scheduler.has_work
    assert max(timeout for timeout in mailbox.timeouts_s if timeout is not None) <= LINGER_LIMIT_S * 1.001
