"""A recorded run once more: the same calls at the same times, every plan compared with the recorded one.

The scheduler decides by its calls and their times alone, so with the recorded ids it must plan the same again, bit for
bit. With a runner the ids are computed anew from the same plans and compared as well.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

import msgspec
import numpy as np

from pageflight.core.plan import Finished, StepPlan, StepResult
from pageflight.loop.recording import Called, Died, Entry, Header, PlanDecoder, Planned, RecordedPlan, Settled, rest_of
from pageflight.loop.watched_scheduler import WatchedScheduler, shown
from pageflight.runners.base import Runner

_SHOWN_CHARACTERS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Where a replay first goes another way. `step`: of the plan concerned, or the next one; `row` -1: none alone."""

    step: int
    row: int = -1
    field: str
    recorded: object
    replayed: object

    def __str__(self) -> str:
        where = f"step {self.step}" + (f", row {self.row}" if self.row >= 0 else "")
        return f"{where}: {self.field} was {_short(self.recorded)} in the recording and is {_short(self.replayed)} now"


@dataclass(slots=True, kw_only=True)
class Replayed:
    """What was replayed, up to `difference` where there is one. `died`: the error that ended the recorded core."""

    num_steps: int = 0
    num_tokens: int = 0
    num_requests: int = 0
    num_refused: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    died: str = ""
    difference: Difference | None = None


class _Differs(Exception):
    def __init__(self, difference: Difference) -> None:
        super().__init__(str(difference))
        self.difference = difference


def replay(header: Header, entries: Iterable[Entry], *, runner: Runner | None = None, check: bool = False) -> Replayed:
    """Replay the `entries` that follow `header`, up to the first difference.

    `runner` computes the ids again; its limits must be the recorded core's. With `check` every invariant is checked
    after every step: raises InvariantBroken.
    """
    run = _Run(header, runner, check)
    try:
        for entry in entries:
            run.take(entry)
    except _Differs as found:
        run.result.difference = found.difference
    return run.result


class _Run:
    def __init__(self, header: Header, runner: Runner | None, check: bool) -> None:
        config = header.config
        self.result = Replayed()
        self._scheduler = WatchedScheduler(
            config.scheduler, config.kv, vocab_size=header.vocab_size, check_every=int(check)
        )
        self._runner, self._id_type = runner, header.id_type
        self._decoder = PlanDecoder()
        self._flights: deque[StepPlan] = deque()
        self._step = 0

    def take(self, entry: Entry) -> None:
        match entry:
            case Called():
                self._call(entry)
            case Planned():
                self._plan(entry)
            case Settled():
                self._settle(entry)
            case Died():
                self.result.died = entry.message
            case Header():
                raise AssertionError("a recording has one header")

    def _call(self, entry: Called) -> None:
        method = getattr(self._scheduler, entry.name)
        hints = get_type_hints(method)
        arguments = {name: msgspec.convert(value, hints[name]) for name, value in entry.arguments.items()}
        returned, raised = None, ""
        try:
            returned = method(**arguments)
        except Exception as error:
            raised = shown(error)
        if entry.name == "submit":
            self.result.num_requests += 1
            self.result.num_refused += bool(raised)
        self._same(f"error of {entry.name}", entry.raised, raised)
        self._same(f"result of {entry.name}", entry.returned, _listed(msgspec.to_builtins(returned)))

    def _plan(self, entry: Planned) -> None:
        self._see(entry.now_s)
        plan, raised = None, ""
        try:
            plan = self._scheduler.plan(entry.now_s)
        except AssertionError as error:
            raised = shown(error)
        self._same("error of plan", entry.raised, raised)
        recorded = self._decoder.plan(entry)
        if plan is None or recorded is None:
            self._same("plan", recorded and recorded.rows.tolist(), plan and plan.rows.tolist())
            return
        self._step = recorded.step
        self._compare(recorded, plan)
        self._step = recorded.step + 1
        self._flights.append(plan)
        self.result.num_steps += 1

    def _compare(self, recorded: RecordedPlan, plan: StepPlan) -> None:
        self._same("step", recorded.step, plan.step)
        self._same("rows", recorded.rows.tolist(), plan.rows.tolist())
        rows = plan.rows.tolist()
        for name in ("starts_at", "lengths", "samples"):
            self._same_by_row(name, rows, getattr(recorded, name).tolist(), getattr(plan, name).tolist())
        before, now = _listed(recorded.rest), _listed(rest_of(plan))
        for name in dict.fromkeys((*before, *now)):
            if name.startswith("table_"):
                self._same_by_row(name, before.get("table_rows", ()), before.get(name, ()), now.get(name, ()))
            self._same(name, before.get(name), now.get(name))

    def _settle(self, entry: Settled) -> None:
        self._see(entry.now_s)
        plan, next_step = self._flights.popleft(), self._step
        self._step = plan.step
        ids = np.frombuffer(entry.ids, self._id_type).astype(np.int32)
        log_probs = None if entry.log_probs is None else np.frombuffer(entry.log_probs, np.float32)
        broken = None if entry.broken is None else np.frombuffer(entry.broken, np.bool_)
        result = StepResult(plan.step, ids, log_probs, broken)
        if self._runner is not None:
            self._compute(self._runner, plan, result)
        finished: tuple[Finished, ...] = ()
        raised = ""
        try:
            finished = self._scheduler.settle(plan, result, entry.now_s).finished
        except AssertionError as error:
            raised = shown(error)
        self._same("error of settle", entry.raised, raised)
        self._same("finished", _listed(msgspec.to_builtins(entry.finished)), _listed(msgspec.to_builtins(finished)))
        self.result.num_tokens += len(ids)
        self._step = next_step

    def _compute(self, runner: Runner, plan: StepPlan, recorded: StepResult) -> None:
        runner.submit(plan)
        result = runner.collect()
        rows = plan.rows[plan.samples].tolist()
        self._same_by_row("broken", rows, _broken(recorded, len(rows)), _broken(result, len(rows)))
        self._same_by_row("sampled_ids", rows, recorded.sampled_ids.tolist(), result.sampled_ids.tolist())

    def _see(self, now_s: float) -> None:
        self.result.first_s = self.result.first_s or now_s
        self.result.last_s = now_s

    def _same_by_row(
        self, field: str, rows: Sequence[int], recorded: Sequence[object], replayed: Sequence[object]
    ) -> None:
        """Lists with an entry for each of `rows`."""
        for row, before, now in zip(rows, recorded, replayed, strict=False):
            self._same(field, before, now, row=row)
        self._same(field, recorded, replayed)

    def _same(self, field: str, recorded: object, replayed: object, *, row: int = -1) -> None:
        if recorded != replayed:
            raise _Differs(Difference(step=self._step, row=row, field=field, recorded=recorded, replayed=replayed))


def _broken(result: StepResult, count: int) -> list[bool]:
    return [False] * count if result.broken is None else result.broken.tolist()


def _listed(value: Any) -> Any:
    """Tuples and recorded arrays (all of int32) as lists, all the way down."""
    if isinstance(value, bytes):
        return np.frombuffer(value, np.int32).tolist()
    if isinstance(value, Mapping):
        return {name: _listed(entry) for name, entry in value.items()}
    return [_listed(entry) for entry in value] if isinstance(value, list | tuple) else value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
