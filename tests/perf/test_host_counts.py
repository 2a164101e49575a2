"""What a step executes stays what it was: counted, so that a busy or slow machine changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import Any

import pytest
from perf.decode_steps import Case
from perf.host_counts import CASES, Counts, read_baseline

from pageflight.sched.scheduler import Scheduler
from perf import host_counts

ALLOWED = 1.2
"""Of the baseline: a fifth more is a regression."""
SLACK_BYTES = 2048
"""Sizes of Python's own objects differ between its versions."""


@cache
def counted(name: str) -> Counts:
    return host_counts.count(name)


def regressions(name: str, counts: Counts, baseline: Counts) -> list[str]:
    found = []
    for item in fields(Counts):
        now, before = getattr(counts, item.name), getattr(baseline, item.name)
        limit = ALLOWED * before + (SLACK_BYTES if item.name == "peak_bytes" else 0)
        if now > limit:
            found.append(f"{name}: {item.name} {before:.0f} → {now:.0f}")
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_step_executes_no_more_than_the_baseline(name: str) -> None:
    """Each change added a little. Where more work per step is meant: perf/host_counts.py --write, and say why."""
    baseline = read_baseline()
    assert baseline.keys() == CASES.keys()
    assert regressions(name, counted(name), baseline[name]) == []


@pytest.mark.parametrize(("few", "many"), [(32, 256), (256, 1024)])
def test_a_step_grows_no_more_than_linearly_with_running_sequences(few: int, many: int) -> None:
    one, other = counted(f"{few} running"), counted(f"{many} running")
    for name in ("lines", "calls", "compiled_calls"):
        assert getattr(other, name) <= many / few * getattr(one, name), name
    # Arrays of one number per position of all rows, and of one per block: twice linear leaves room for both.
    assert other.peak_bytes <= 2 * many / few * one.peak_bytes


@pytest.mark.parametrize("name", ["256 running, 10000 waiting", "256 running, 10000 waiting, fair"])
def test_a_step_does_not_know_how_many_wait(name: str) -> None:
    """10,000 waiting requests were walked through for the one that was to be next."""
    alone, beside = counted("256 running"), counted(name)
    for item in fields(Counts):
        assert getattr(beside, item.name) <= 1.05 * getattr(alone, item.name), item.name


def looping(plan: Callable[..., Any]) -> Callable[..., Any]:
    def with_loop(scheduler: Scheduler, now_s: float) -> Any:
        for row in range(scheduler.config.max_num_seqs):
            _unused = row + 1
        return plan(scheduler, now_s)

    return with_loop


def copying(plan: Callable[..., Any]) -> Callable[..., Any]:
    def with_copy(scheduler: Scheduler, now_s: float) -> Any:
        _unused = scheduler.space.pool._refs.copy()
        return plan(scheduler, now_s)

    return with_copy


@pytest.mark.parametrize(("spoil", "what"), [(looping, "lines"), (copying, "peak_bytes")])
def test_the_guard_notices_a_loop_over_sequences_and_a_copy_of_blocks(
    spoil: Callable[..., Any], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guard that cannot fail is none."""
    monkeypatch.setattr(Scheduler, "plan", spoil(Scheduler.plan))
    monkeypatch.setitem(CASES, "spoilt", Case(num_running=256, num_steps=64))
    spoilt = host_counts.count("spoilt")
    assert any(what in line for line in regressions("256 running", spoilt, read_baseline()["256 running"]))
