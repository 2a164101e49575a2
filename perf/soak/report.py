"""The end of a soak for people, and as one line of JSON."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections import Counter

from perf import figures
from perf.soak.run import Result
from perf.soak.verdict import Outcome

_COUNTERS = (
    "preemptions",
    "kv_swaps",
    "engine_restarts",
    "replayed_sequences",
    "recomputed_tokens",
    "cached_tokens",
    "generated_tokens",
)


def text(result: Result) -> str:
    """A dozen lines."""
    counts = result.tally.outcomes
    outcomes = ", ".join(f"{counts[each]} {each.value}" for each in Outcome if counts[each])
    lines = [
        f"{result.tally.num_sent} requests: {outcomes}",
        f"kills: {result.num_core_kills} of the core, {len(result.stub_kills)} of stubs {_stubs(result)}",
        ", ".join(f"{result.counted.get(name, 0)} {name.replace('_', ' ')}" for name in _COUNTERS),
        "",
        *(str(check) for check in result.checks),
    ]
    failed = [check for check in result.checks if not check.is_ok]
    verdict = "all checks passed" if not failed else f"{len(failed)} CHECKS FAILED"
    return "\n".join([*lines, *("  " + failure for failure in result.tally.failures[:20]), "", verdict])


def record(result: Result) -> figures.Record:
    plan = result.plan
    return {
        "benchmark": "soak",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "ok": result.is_ok,
        "minutes": plan.minutes,
        "clients": plan.clients,
        "seed": plan.seed,
        "checkpoint": plan.deployment.name,
        "requests": result.tally.num_sent,
        "outcomes": {each.value: result.tally.outcomes[each] for each in Outcome},
        "core_kills": result.num_core_kills,
        "stub_kills": dict(Counter(result.stub_kills)),
        "kept_stubs": result.num_kept_stubs,
        "return_s": [round(seconds, 1) for seconds in result.return_s],
        **{name: result.counted.get(name, 0) for name in _COUNTERS},
        "exit_s": round(result.exit_s, 1),
        "rss_kib": {each.role: [each.first_kib, each.last_kib] for each in result.growth},
        "rss_kib_min": {
            each.role: None if each.slope_kib_min is None else round(each.slope_kib_min, 1) for each in result.growth
        },
        "checks": {check.name: [check.value, check.limit] for check in result.checks},
        "failed": [check.name for check in result.checks if not check.is_ok],
        "pageflight": importlib.metadata.version("pageflight"),
        **result.versions,
        **figures.machine(),
    }


def _stubs(result: Result) -> str:
    if not result.stub_kills:
        return ""
    back = f"; back after {', '.join(f'{seconds:.1f}' for seconds in result.return_s)} s"
    return f"({', '.join(result.stub_kills)}{back})"
