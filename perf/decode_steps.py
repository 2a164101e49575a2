"""The product's own parts around a runner that answers at once: what `host_cost` times and `host_counts` counts.

Prefix cache on, prompts of random ids, pure decode steps, real sockets to a front in the same process whose reading is
no part of a step.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig, SchedulingPolicy
from pageflight.core.plan import StepEvents, StepPlan, StepResult
from pageflight.core.request import Request, SamplingParams
from pageflight.loop.address import private_address
from pageflight.loop.client import CoreClient
from pageflight.loop.frames import CoreLimits, Hello
from pageflight.loop.mailbox import ZmqMailbox
from pageflight.loop.recorder import Recorder
from pageflight.loop.recording import Header
from pageflight.loop.watched_scheduler import WatchedScheduler
from pageflight.runners.base import RunnerLimits
from pageflight.runners.fake import InstantRunner
from pageflight.sched.scheduler import Scheduler

VOCAB_SIZE = 8_000
NUM_TENANTS = 8
_FRONT = 1 << 44  # the first front's handles, as the mailbox numbers them


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What runs: sequences that decode for `num_steps` at least, and requests that wait behind them."""

    num_running: int
    num_waiting: int = 0
    prompt_len: int = 128
    num_steps: int = 400
    block_size: int = 16
    policy: SchedulingPolicy = "fcfs"
    recorded: bool = False


class Line:
    """The core's mailbox with one front connected to it, both in this process."""

    def __init__(self, limits: CoreLimits) -> None:
        self._address = private_address()
        self._address.create()
        self.mailbox = ZmqMailbox(self._address, limits, beat=lambda: None)
        self._client = CoreClient(self._address)
        until_s = time.monotonic() + 10.0
        while not any(isinstance(message, Hello) for message in self._client.receive(0.01)):
            if time.monotonic() > until_s:
                raise TimeoutError("the mailbox does not answer its front")
            self.mailbox.receive(0.01)

    def read(self) -> None:
        self._client.receive(0.0)

    def close(self) -> None:
        self._client.close()
        self.mailbox.close(0.1)
        self._address.remove()


@dataclass(slots=True, eq=False)
class DecodeSteps:
    """A core whose running sequences all decode. A step is `receive`, `plan`, `prepare`, `run`, `settle`, `publish`."""

    case: Case
    scheduler: Scheduler
    runner: InstantRunner
    line: Line
    recorder: Recorder | None
    _numbers: random.Random = field(default_factory=lambda: random.Random(5))
    _num_submitted: int = 0

    def submit(self, max_tokens: int) -> None:
        """One more request of random ids."""
        ids = tuple(self._numbers.choices(range(10, VOCAB_SIZE), k=self.case.prompt_len))
        number = self._num_submitted
        sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=(2,))
        tenant = "" if self.case.policy == "fcfs" else f"tenant {number % NUM_TENANTS}"
        self.scheduler.submit(Request(handle=_FRONT | number, prompt_ids=ids, sampling=sampling, tenant=tenant), 0.0)
        self._num_submitted += 1

    def receive(self) -> None:
        self.line.mailbox.receive(0.0)

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan(0.0)
        assert plan is not None
        return plan

    def prepare(self, plan: StepPlan) -> None:
        self.runner.submit(plan)

    def run(self) -> StepResult:
        """Stands for the model and its sampler."""
        return self.runner.collect()

    def settle(self, plan: StepPlan, result: StepResult) -> StepEvents:
        return self.scheduler.settle(plan, result, 0.0)

    def publish(self, events: StepEvents) -> None:
        self.line.mailbox.publish(events)

    def read(self) -> None:
        """The front's side of a step."""
        self.line.read()


@contextmanager
def decode_steps(case: Case) -> Iterator[DecodeSteps]:
    """A core in which `case.num_running` prompts are computed and their sequences can decode `case.num_steps` times."""
    max_len = case.prompt_len + case.num_steps + 32
    num_blocks = case.num_running * (max_len // case.block_size + 2)
    config = SchedulerConfig(
        max_num_tokens=8192,
        max_num_seqs=case.num_running,
        max_model_len=max_len,
        max_queue_size=20_000,
        scheduling_policy=case.policy,
    )
    kv = KVConfig(block_size=case.block_size, num_blocks=num_blocks)
    limits = RunnerLimits(
        num_blocks=num_blocks,
        block_size=case.block_size,
        max_num_seqs=case.num_running,
        max_model_len=max_len,
        vocab_size=VOCAB_SIZE,
    )
    line = Line(
        CoreLimits(
            max_model_len=max_len,
            num_blocks=num_blocks,
            block_size=case.block_size,
            vocab_size=VOCAB_SIZE,
            max_num_seqs=case.num_running,
            max_queue_size=config.max_queue_size,
        )
    )
    recorder = _recorder(EngineConfig(scheduler=config, kv=kv)) if case.recorded else None
    scheduler = Scheduler(config, kv, vocab_size=VOCAB_SIZE)
    if recorder is not None:
        scheduler = WatchedScheduler(config, kv, vocab_size=VOCAB_SIZE, recorder=recorder)
    steps = DecodeSteps(case, scheduler, InstantRunner(limits, first_id=10), line, recorder)
    for _ in range(case.num_running + case.num_waiting):
        steps.submit(max_len - case.prompt_len)
    while scheduler.stats().num_running < case.num_running or scheduler.stats().num_context:
        plan = steps.plan()
        steps.prepare(plan)
        steps.settle(plan, steps.run())
    yield steps
    scheduler.check()
    if recorder is not None:
        recorder.close()
    line.close()


def _recorder(config: EngineConfig) -> Recorder:
    """Writes for real, to a file that is gone when it is closed."""
    header = Header(config=config, vocab_size=VOCAB_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        return Recorder(Path(folder) / "run.rec", header)
