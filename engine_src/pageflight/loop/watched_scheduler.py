"""A scheduler that is looked at while it works: its calls are recorded, its invariants checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pageflight.core.config import KVConfig, SchedulerConfig
from pageflight.core.errors import ConfigError
from pageflight.core.plan import Finished, StepEvents, StepPlan, StepResult
from pageflight.core.request import Request
from pageflight.core.tenants import Tenants
from pageflight.loop.recorder import Recorder
from pageflight.loop.recording import Called, Planned
from pageflight.sched.scheduler import Scheduler

Returned = TypeVar("Returned")


class InvariantBroken(AssertionError):
    """Blocks, rows or the queue do not fit together any more: whatever this core said next could be wrong."""


class WatchedScheduler(Scheduler):
    """`recorder` keeps every call that changes something; `check_every` settled steps (0: never), `check()` is called.

    Calls that the scheduler makes on itself are no input of the run and are not recorded.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVConfig,
        *,
        vocab_size: int,
        recorder: Recorder | None = None,
        check_every: int = 0,
    ) -> None:
        super().__init__(config, kv, vocab_size=vocab_size)
        if check_every and not __debug__:
            raise ConfigError("check_invariants needs assertions: start Python without -O and PYTHONOPTIMIZE")
        self._check_every = check_every
        self._recorder = recorder  # None also while a call is under way

    def submit(self, request: Request, now_s: float) -> None:
        self._call(super().submit, request=request, now_s=now_s)

    def cancel(self, handle: int, *, by_client: bool = True) -> bool:
        return self._call(super().cancel, handle=handle, by_client=by_client)

    def fail(self, handle: int, message: str) -> bool:
        return self._call(super().fail, handle=handle, message=message)

    def set_tenants(self, tenants: Tenants) -> None:
        self._call(super().set_tenants, tenants=tenants)

    def drain(self) -> None:
        self._call(super().drain)

    def end_all(self, reason: str, message: str = "") -> None:
        self._call(super().end_all, reason=reason, message=message)

    def take_endings(self) -> tuple[Finished, ...]:
        endings = super().take_endings()
        if endings and self._recorder is not None:  # the loop asks after every step; mostly there is nothing to take
            self._recorder.add(Called("take_endings", {}, endings))
        return endings

    def plan(self, now_s: float) -> StepPlan | None:
        recorder, self._recorder = self._recorder, None
        try:
            plan = super().plan(now_s)
        except Exception as error:
            if recorder is not None:
                recorder.add(Planned(now_s, raised=shown(error)))
            raise
        finally:
            self._recorder = recorder
        if recorder is not None:
            if plan is not None:
                recorder.add_plan(now_s, plan)
            else:
                recorder.add(Planned(now_s))
        if plan is None and self._check_every and not self.has_work:
            self._check_invariants("when nothing was left to do")
        return plan

    def settle(self, plan: StepPlan, result: StepResult, now_s: float) -> StepEvents:
        recorder, self._recorder = self._recorder, None
        try:
            events = super().settle(plan, result, now_s)
        except Exception as error:
            if recorder is not None:
                recorder.add_settled(now_s, result, (), shown(error))
            raise
        finally:
            self._recorder = recorder
        if recorder is not None:
            recorder.add_settled(now_s, result, events.finished)
        if self._check_every and plan.step % self._check_every == 0:
            self._check_invariants(f"after step {plan.step}")
        return events

    def _call(self, method: Callable[..., Returned], **arguments: Any) -> Returned:
        recorder, self._recorder = self._recorder, None
        try:
            returned = method(**arguments)
        except Exception as error:
            if recorder is not None:
                recorder.add(Called(method.__name__, arguments, raised=shown(error)))
            raise
        finally:
            self._recorder = recorder
        if recorder is not None:
            recorder.add(Called(method.__name__, arguments, returned))
        return returned

    def _check_invariants(self, when: str) -> None:
        try:
            self.check()
        except AssertionError as error:
            raise InvariantBroken(f"invariant broken {when}: {error}") from error


def shown(error: BaseException) -> str:
    """An error as recordings have it."""
    return f"{type(error).__name__}: {error}"
