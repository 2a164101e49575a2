"""One soak from its start to its checks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from perf.soak.checks import Check, nothing
from perf.soak.clients import Clients
from perf.soak.footprint import Footprint, compare, files_in, footprint
from perf.soak.killer import Killer, KillPlan
from perf.soak.memory import Growth
from perf.soak.mix import Mix
from perf.soak.observer import Observer
from perf.soak.outages import Outages
from perf.soak.server import Deployment, Running, build, serving
from perf.soak.verdict import Outcome, Tally
from perf.soak.vocabulary import Vocabulary
from perf.wire import Model, Stream

_SETTLE_S = 30.0
"""How long a server without clients may take to have nothing open any more."""
_GONE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    minutes: float
    clients: int
    seed: int
    kills: KillPlan
    calm_share: float  # of the time, at its end, without kills: memory is judged in the second half of that
    warm_up_s: float
    idle_s: float
    hang_limit_s: float
    flat_kib_min: float
    deployment: Deployment


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    plan: Plan
    tally: Tally
    checks: list[Check]
    growth: list[Growth]
    counted: Mapping[str, int]
    num_core_kills: int
    stub_kills: list[str]
    num_kept_stubs: int
    """Killed ones whose models tritonserver could not unload."""
    return_s: list[float]
    exit_s: float
    versions: Mapping[str, str]

    @property
    def is_ok(self) -> bool:
        return all(check.is_ok for check in self.checks)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What was seen of the server between its first load and its end."""

    before: Footprint
    after: Footprint
    was_idle: bool
    series: Mapping[str, float]  # of the idle server at last
    growth: list[Growth]
    ended_unasked: set[str]


def soak(plan: Plan, folder: Path, log_file: Path, tell: Callable[[str], None]) -> Result:
    """Raises SoakError when the server does not start or answer. `folder` is empty and the soak's own."""
    tell("building")
    build(plan.deployment, folder / "repository")
    segments_before = _segments()
    with serving(folder / "repository", folder, log_file, check_invariants=plan.deployment.check_invariants) as running:
        outages = Outages()
        clients, observer = _clients(plan, running, outages), Observer(running)
        killer = Killer(running, plan.deployment.name, plan.kills, outages, plan.seed)
        versions = running.versions()
        seen = _watched(plan, running, clients, killer, observer, tell)
        tell("shutting down")
        running.stop()
        _wait_until(lambda: len(observer.gone()) == len(observer.lives), _GONE_S)
        orphans = [f"{life.role} {life.pid}" for life in observer.lives if life.is_running]
    left_over = (_segments() - segments_before) & (observer.segments | seen.before.segments | seen.after.segments)
    tally = clients.tally
    checks = [
        Check("failed requests", tally.outcomes[Outcome.FAILED], 0, "; ".join(tally.failures[:3])),
        Check("requests without an outcome", tally.num_unaccounted, 0),
        nothing("kinds of outcomes that did not occur", _missing(plan, tally)),
        Check("requests still open or blocks still held, idle", 0 if seen.was_idle else 1, 0, held(seen.series)),
        nothing("processes that ended unasked", seen.ended_unasked),
        nothing("models that did not come back", outages.never_ended),
        Check("requests given up as poison", observer.counted["poison_requests"], 0),
        Check("tracebacks in the server's log", sum("Traceback" in line for line in running.log), 0),
        *compare(seen.before, seen.after, num_stub_kills=len(killer.stub_kills)),
        *(_flat(each, plan.flat_kib_min) for each in seen.growth),
        Check("exit status other than 0", int(running.exit_status != 0), 0),
        nothing("processes after the end", orphans),
        nothing("shared-memory segments after the end", left_over),
        nothing("files in the meeting place after the end", files_in(running.runtime)),
    ]
    return Result(
        plan=plan,
        tally=tally,
        checks=checks,
        growth=seen.growth,
        counted=observer.counted,
        num_core_kills=killer.num_core_kills,
        stub_kills=killer.stub_kills,
        num_kept_stubs=seen.after.num_zombies,
        return_s=killer.return_s,
        exit_s=running.exit_s,
        versions=versions,
    )


def _watched(
    plan: Plan, running: Running, clients: Clients, killer: Killer, observer: Observer, tell: Callable[[str], None]
) -> _Seen:
    """Warm-up, load with kills, load without, and what the idle server holds before and after."""
    tell("undisturbed: what every known question is answered")
    clients.learn()
    tell(f"warming up, {plan.clients} clients")
    clients.run(plan.clients, time.monotonic() + plan.warm_up_s / 2)
    if plan.kills.core_every_s:
        killer.kill_core()  # what the first death leaves for good, such as a file about it, is no leak
    clients.run(plan.clients, time.monotonic() + plan.warm_up_s / 2)
    was_idle = _settled(running, plan.idle_s)
    before = footprint(running.process.pid, running.runtime)
    observer.start()
    tell(f"soaking for {plan.minutes:g} min")
    end_s = time.monotonic() + 60 * plan.minutes
    killer.start()
    clients.run(plan.clients, end_s - plan.calm_share * 60 * plan.minutes)
    killer.stop()
    calm_s = time.monotonic()
    tell("no more kills")
    clients.run(plan.clients, end_s)
    end_s = time.monotonic()
    tell("idle")
    was_idle = _settled(running, plan.idle_s) and was_idle
    after, series = footprint(running.process.pid, running.runtime), running.series()
    observer.stop()
    return _Seen(
        before=before,
        after=after,
        was_idle=was_idle,
        series=series,
        growth=observer.memory.growth((calm_s + end_s) / 2, end_s),  # before that, new processes fill their caches
        ended_unasked={
            f"{life.role} {life.pid}"
            for life in observer.gone()
            if life not in killer.killed and life.role in before.roles  # the others are shells that start a stub
        },
    )


def _clients(plan: Plan, running: Running, outages: Outages) -> Clients:
    name, checkpoint = plan.deployment.name, plan.deployment.checkpoint
    vocab_size = int(json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    with Stream(running.grpc_address) as stream:
        models = {each: Model.ask(stream.channel, each, timeout_s=60) for each in (name, "engine", "ensemble")}
    mix = Mix(
        Vocabulary(checkpoint / "tokenizer.json"),
        max_model_len=plan.deployment.max_model_len,
        vocab_size=vocab_size,
        max_queue_size=plan.deployment.max_queue_size,
        seed=plan.seed,
    )
    return Clients(running, name, models, mix, outages, plan.hang_limit_s, plan.deployment.deterministic)


def _settled(running: Running, idle_s: float) -> bool:
    """Whether nothing is open and no block is held, at last and after `idle_s` more."""
    _wait_until(lambda: _is_idle(running.series()), _SETTLE_S)
    time.sleep(idle_s)
    return _is_idle(running.series())


def _is_idle(series: Mapping[str, float]) -> bool:
    return bool(series) and not held(series)


def held(series: Mapping[str, float]) -> str:
    """What is not as in an idle server; blocks that only the prefix cache keeps count as free."""

    def of(family: str, kind: str) -> float:
        return sum(value for name, value in series.items() if name.startswith(family) and f'="{kind}"' in name)

    requests = "nv_trt_llm_request_metrics"
    held = {f"{kind} requests": of(requests, kind) for kind in ("active", "waiting", "scheduled")}
    for what, family in (("blocks", "nv_trt_llm_kv_cache_block_metrics"), ("host blocks", "pageflight_kv_host_blocks")):
        held[what] = of(family, "max") - of(family, "free")
    return ", ".join(f"{value:g} {what}" for what, value in held.items() if value)


def _missing(plan: Plan, tally: Tally) -> set[str]:
    """A soak without cancellations has not tried them. Rare kinds need time."""
    expected = {Outcome.COMPLETED, Outcome.REFUSED, Outcome.CANCELLED, Outcome.DISCONNECTED}
    if plan.minutes >= 1:
        expected |= {Outcome.OVERFLOW, Outcome.DEADLINE}
    return {outcome.value for outcome in expected if not tally.outcomes[outcome]}


def _flat(growth: Growth, limit_kib_min: float) -> Check:
    name = f"memory growth of {growth.role}, KiB/min"
    if growth.slope_kib_min is None:
        return Check(name, 0, limit_kib_min, "too few samples to tell")
    detail = f"{growth.first_kib} to {growth.last_kib} KiB"
    return Check(name, round(growth.slope_kib_min, 1), limit_kib_min, detail)


def _segments() -> frozenset[str]:
    with suppress(OSError):
        return frozenset(path.name for path in Path("/dev/shm").iterdir())
    return frozenset()


def _wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    until_s = time.monotonic() + timeout_s
    while time.monotonic() < until_s and not condition():
        time.sleep(0.25)
