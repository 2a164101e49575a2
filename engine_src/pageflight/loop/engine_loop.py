"""The step loop: commands in, plans to the runner, events out."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pageflight.core.errors import PageflightError
from pageflight.core.plan import Finished, StepEvents, StepPlan
from pageflight.core.request import Request
from pageflight.core.stats import CoreStats
from pageflight.loop.clock import Clock, monotonic_clock
from pageflight.runners.base import Runner, StagingRunner
from pageflight.sched.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Submit:
    """Take a request in; a refusal comes back through `Mailbox.reject`."""

    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    """End one sequence; no effect if it has ended already. `by_client`: nobody wants its answer any more."""

    handle: int
    by_client: bool = True


@dataclass(frozen=True, slots=True)
class Drain:
    """Take no new requests, finish the open ones, then leave the loop."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End the open sequences as cancelled and leave the loop."""


LINGER_SHARE = 0.05
LINGER_LIMIT_S = 0.005
"""How long the loop may wait for the successors of requests that ended: a share of a step, within this limit."""

AHEAD_SHARE = 0.02
"""The next step is planned while one runs if planning takes at least this share of a step. Below, it gains little, and
a request that arrives meanwhile would wait one step longer."""

Command = Submit | Cancel | Drain | Shutdown


class Mailbox(Protocol):
    """The loop's connection to the fronts. All methods are called by the loop's thread; none may wait for a front."""

    def receive(self, timeout_s: float | None) -> Many[Command]:
        """Commands that came since the last call. Waits up to `timeout_s` for the first; None: as long as it takes."""

    def publish(self, events: StepEvents) -> None:
        """News of a step. Called once per step that had any."""

    def reject(self, handle: int, error: PageflightError) -> None:
        """The request with this handle was refused; none of its sequences gets any other event."""


class Trace(Protocol):
    """Learns what the loop works on before it does (`step_trace.StepTrace`)."""

    def begin(self, handles_R: NDArray[np.int64], rows_S: NDArray[np.int32]) -> None: ...

    def end(self) -> None: ...

    def take(self, handle: int) -> None: ...

    def taken(self) -> None: ...


class NoTrace:
    """A Trace that nobody will read."""

    def begin(self, handles_R: NDArray[np.int64], rows_S: NDArray[np.int32]) -> None: ...
    def end(self) -> None: ...
    def take(self, handle: int) -> None: ...
    def taken(self) -> None: ...


class EngineLoop:
    """Runs a scheduler's plans on a runner. An exception of the runner ends the loop: its owner restarts the core.

    `report` gets the scheduler's statistics at most every `report_interval_s` seconds while steps run, and once when
    the loop goes idle. `ahead`: whether steps are planned while others run; None: where it pays (`AHEAD_SHARE`). A
    runner that takes a second step while one runs gets it as soon as it is planned, so it never waits for the loop.
    """

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        runner: Runner,
        mailbox: Mailbox,
        clock: Clock = monotonic_clock,
        trace: Trace | None = None,
        ahead: bool | None = None,
        report: Callable[[CoreStats], None] | None = None,
        report_interval_s: float = 0.25,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.mailbox = mailbox
        self.clock = clock
        self.is_finished = False
        self._trace = trace or NoTrace()
        self._unpublished: StepEvents | None = None
        self._ahead = ahead
        self._planned: StepPlan | None = None  # while another one ran
        self._is_submitted = False  # the planned step, too
        self._is_trial = False  # the step that was planned last
        self._plan_s = self._step_s = 0.0  # smoothed
        self._report = report
        self._report_interval_s = report_interval_s
        self._next_report_s = 0.0
        self._is_idle_reported = True

    def run(self) -> None:
        """Step until a Drain has run dry or a Shutdown came."""
        while not self.is_finished:
            self.step()

    def step(self) -> None:
        """One turn. Events of the step before go out, and the next one may be planned, while this one computes."""
        for command in self.mailbox.receive(self._patience_s()):
            self._obey(command)
        plan, self._planned = self._planned, None
        was_submitted, self._is_submitted = self._is_submitted, False
        if plan is None:
            plan = self._plan()
        if plan is None:
            self._publish()
            self._publish_endings()
            self.is_finished = self.is_finished or (self.scheduler.is_draining and not self.scheduler.has_work)
            self._report_stats(idle=True)
            return
        started_s = self.clock()
        if not was_submitted:
            self._trace.begin(self.scheduler.handles, plan.rows)
            self.runner.submit(plan)
        self._publish()
        self._publish_endings()
        if self._plans_ahead():
            self._plan_ahead(plan)
        result = self.runner.collect()
        now_s = self.clock()
        self._step_s = _smoothed(self._step_s, now_s - started_s)
        self._unpublished = self.scheduler.settle(plan, result, now_s)
        self._trace.end()
        if self._is_submitted and self._planned is not None:
            self._trace.begin(self.scheduler.handles, self._planned.rows)
        if self._unpublished.finished and not self.scheduler.num_waiting and self._planned is None:
            self._await_successors(len(self._unpublished.finished), now_s - started_s)
        self._report_stats(idle=False)

    def _plan(self) -> StepPlan | None:
        begin_s = self.clock()
        accused = self.scheduler.accused
        self._is_trial = accused is not None
        if accused is not None:
            self._trace.take(accused)
        plan = self.scheduler.plan(begin_s)
        if accused is not None:
            self._trace.taken()
        self._plan_s = _smoothed(self._plan_s, self.clock() - begin_s)
        return plan

    def _plans_ahead(self) -> bool:
        if self._ahead is not None:
            return self._ahead
        return self.runner.limits.max_in_flight > 1 or self._plan_s > AHEAD_SHARE * self._step_s

    def _plan_ahead(self, running: StepPlan) -> None:
        for command in self.mailbox.receive(0.0):
            self._obey(command)
        if self._is_trial or self.scheduler.accused is not None:
            return  # the trace would name others beside the accused, or it, whoever brings the step in flight down
        handles = self.scheduler.handles[running.rows]  # a copy: rows may be taken anew while their step runs
        self._planned = self._plan()
        if self._planned is None:
            return
        if self.runner.limits.max_in_flight > 1:
            both = np.union1d(handles, self.scheduler.handles[self._planned.rows])
            self._trace.begin(both, np.arange(both.size, dtype=np.int32))
            self.runner.submit(self._planned)
            self._is_submitted = True
        elif isinstance(self.runner, StagingRunner):
            self.runner.stage(self._planned)

    def _await_successors(self, num_ended: int, step_s: float) -> None:
        """Clients that send one request after another send the next as soon as they have their answer.

        It would arrive just after the next step has begun and wait all of it for a row that stands empty. So the news
        goes out at once, and the loop waits for as many requests as ended, for a small share of a step.
        """
        deadline_s = self.clock() + min(LINGER_SHARE * step_s, LINGER_LIMIT_S)
        self._publish()
        while num_ended > 0 and (left_s := deadline_s - self.clock()) > 0:
            commands = self.mailbox.receive(left_s)
            if not commands:
                return
            for command in commands:
                self._obey(command)
                num_ended -= isinstance(command, Submit)

    def _patience_s(self) -> float | None:
        """How long to wait for commands: not at all while there is work or news, for ever when there is neither."""
        is_told = self._report is None or self._is_idle_reported  # that nothing runs any more
        has_news = self._unpublished is not None or self._planned is not None
        if self.scheduler.has_work or has_news or self.scheduler.is_draining or not is_told:
            return 0.0
        return None

    def _obey(self, command: Command) -> None:
        match command:
            case Submit(request):
                self._trace.take(request.handle)
                try:
                    self.scheduler.submit(request, self.clock())
                except PageflightError as error:
                    self.mailbox.reject(request.handle, error)
                self._trace.taken()
            case Cancel(handle, by_client):
                self.scheduler.cancel(handle, by_client=by_client)
            case Drain():
                self.scheduler.drain()
            case Shutdown():
                self.scheduler.drain()
                self.scheduler.end_all("cancelled", "the server is shutting down")
                self.is_finished = True

    def _publish(self) -> None:
        events, self._unpublished = self._unpublished, None
        if events is not None and (len(events.ids) or events.finished):
            self.mailbox.publish(events)

    def _publish_endings(self) -> None:
        """Final events that no step brought go out at once: their clients have waited long enough."""
        endings = self.scheduler.take_endings()
        if endings:
            self.mailbox.publish(endings_only(endings))

    def _report_stats(self, *, idle: bool) -> None:
        if self._report is None:
            return
        now_s = self.clock()
        if now_s >= self._next_report_s or (idle and not self._is_idle_reported):
            self._report(self.scheduler.stats())
            self._next_report_s = now_s + self._report_interval_s
        self._is_idle_reported = idle


def _smoothed(mean: float, value: float) -> float:
    return value if not mean else mean + 0.1 * (value - mean)


def endings_only(finished: tuple[Finished, ...]) -> StepEvents:
    """Events that carry no ids; their step is -1."""
    return StepEvents(-1, np.zeros(0, np.int64), np.zeros(0, np.int32), None, finished)
