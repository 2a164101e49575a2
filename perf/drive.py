"""One scheduler and one runner driven in this process, every answer kept: for programs that measure the cache.

A runner that computes nothing may move the clock instead (`perf.virtual_engine`): then times are virtual.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pageflight.core.plan import StepEvents, StepPlan
from pageflight.core.request import Request
from pageflight.core.stats import CoreStats
from pageflight.runners.base import Runner
from pageflight.sched.scheduler import Scheduler


class Job(NamedTuple):
    """A request whose client has what it wanted after `num_output` tokens, at most `max_tokens`.

    What is short of `max_tokens` ends as an answer does that meets a stop string: the scheduler learns it afterwards.
    """

    request: Request
    num_output: int


@dataclass(slots=True, eq=False)
class Run:
    """What came of some jobs that were submitted at once."""

    before: CoreStats
    after: CoreStats
    begin_s: float
    end_s: float = 0.0
    full_until_s: float = 0.0  # the last of the jobs started: until then something always waited for a row
    num_full_tokens: int = 0  # that came until then
    peak_blocks: int = 0  # held at once
    num_steps: int = 0
    num_rows: int = 0  # that ran, summed over the steps
    ids: dict[int, list[int]] = field(default_factory=dict)  # by handle
    log_probs: dict[int, list[float]] = field(default_factory=dict)
    first_token_s: dict[int, float] = field(default_factory=dict)  # by handle, since the beginning
    num_cached: dict[int, int] = field(default_factory=dict)  # prompt tokens found, by handle

    @property
    def wall_s(self) -> float:
        return self.end_s - self.begin_s

    @property
    def tok_s(self) -> float:
        """Output tokens per second, first to last."""
        return sum(map(len, self.ids.values())) / self.wall_s

    @property
    def full_tok_s(self) -> float:
        """Output tokens per second while something waited."""
        return self.num_full_tokens / (self.full_until_s - self.begin_s)

    def counted(self, name: str) -> int:
        """How far a counter of `CoreStats` went on."""
        before, after = getattr(self.before, name), getattr(self.after, name)
        assert isinstance(before, int) and isinstance(after, int)
        return after - before


class Drive:
    """`clock` is the runner's. `observe` is told of every step and its seconds."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        clock: Callable[[], float] = time.perf_counter,
        observe: Callable[[StepPlan, float], None] | None = None,
    ) -> None:
        self._scheduler, self._runner, self._clock, self._observe = scheduler, runner, clock, observe

    def run(self, jobs: Sequence[Job]) -> Run:
        """Submit all jobs, and step until the last one has ended."""
        return list(self.steps(jobs))[-1]

    def steps(self, jobs: Sequence[Job]) -> Iterator[Run]:
        """The same step by step: the run as it stands after each, complete after the last."""
        scheduler, begin_s = self._scheduler, self._clock()
        before = scheduler.stats()
        run = Run(before, before, begin_s)
        wanted = {job.request.handle: job.num_output for job in jobs}
        for job in jobs:
            scheduler.submit(job.request, begin_s)
            run.ids[job.request.handle], run.log_probs[job.request.handle] = [], []
        arrivals: list[tuple[float, int]] = []
        while scheduler.has_work:
            planned_s = self._clock()
            plan = scheduler.plan(planned_s)
            assert plan is not None, "work is open but nothing can run"
            run.peak_blocks = max(run.peak_blocks, scheduler.kv.num_blocks - scheduler.space.pool.num_free)
            self._runner.submit(plan)
            result = self._runner.collect()
            now_s = self._clock()
            events = scheduler.settle(plan, result, now_s)
            self._take(events, run, wanted, now_s)
            arrivals.append((now_s, len(events.handles)))
            run.num_rows += len(plan.rows)
            if self._observe is not None:
                self._observe(plan, now_s - planned_s)
            if scheduler.has_work:
                yield run
        run.end_s, run.num_steps, run.after = self._clock(), len(arrivals), scheduler.stats()
        run.num_full_tokens = sum(count for arrival_s, count in arrivals if arrival_s <= run.full_until_s)
        yield run

    def _take(self, events: StepEvents, run: Run, wanted: dict[int, int], now_s: float) -> None:
        log_probs = events.log_probs.tolist() if events.log_probs is not None else [float("nan")] * len(events.ids)
        for handle, token, log_prob in zip(events.handles.tolist(), events.ids.tolist(), log_probs, strict=True):
            run.ids[handle].append(token)
            run.log_probs[handle].append(log_prob)
            run.first_token_s.setdefault(handle, now_s - run.begin_s)
            if len(run.ids[handle]) == wanted[handle]:
                self._scheduler.cancel(handle, by_client=False)
        for ending in (*events.finished, *self._scheduler.take_endings()):
            assert ending.reason in ("length", "cancelled"), f"sequence {ending.handle} ended with {ending.reason}"
            run.full_until_s = max(run.full_until_s, ending.first_scheduled_s)
            run.num_cached[ending.handle] = ending.num_cached_tokens


class Stopwatch:
    """A clock that stands still between the steps of its drive."""

    def __init__(self) -> None:
        self.elapsed_s = 0.0
        self._resumed_s: float | None = None

    def __call__(self) -> float:
        return self.elapsed_s + (time.perf_counter() - self._resumed_s if self._resumed_s is not None else 0.0)

    def resume(self) -> None:
        self._resumed_s = time.perf_counter()

    def pause(self) -> None:
        self.elapsed_s, self._resumed_s = self(), None


def alternate(drives: Sequence[tuple[Drive, Stopwatch]], jobs: Sequence[Job]) -> list[Run]:
    """Run the same jobs on all drives, a step at a time, of the drive that has had the least time until then.

    So a machine whose speed drifts, or that others use as well, is the same for all. Each drive has an engine and a
    stopwatch of its own.
    """
    open_runs = {index: drive.steps(jobs) for index, (drive, _watch) in enumerate(drives)}
    runs: dict[int, Run] = {}
    while open_runs:
        index = min(open_runs, key=lambda index: drives[index][1].elapsed_s)
        watch = drives[index][1]
        watch.resume()
        run = next(open_runs[index], None)
        watch.pause()
        if run is None:
            del open_runs[index]
        else:
            runs[index] = run
    return [runs[index] for index in range(len(drives))]
