"""How much a decode step executes besides the model, counted instead of timed: the same on every machine.

    python perf/host_counts.py [--write]

Counts executed lines and calls of Python, calls of compiled code, and the memory that a step needs for the moment; per
step, over several steps, so that crossing block borders is part of it. What is counted is plan, input preparation,
settling and publishing, as in `host_cost`. One case has 10,000 requests waiting, one has requests that start and end in
every step. `--write` makes today's counts the baseline of tests/perf/test_host_counts.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `perf` is not installed, and this may run as a script

from perf.decode_steps import Case, DecodeSteps, decode_steps

BASELINE = Path(__file__).with_name("baselines") / "host_counts.json"
NUM_SETTLING_STEPS = 4
NUM_COUNTED_STEPS = 16
"""A multiple of the block size: every row crosses one border."""
CHURN_TOKENS = 8

_NUM_STEPS = NUM_SETTLING_STEPS + 2 * NUM_COUNTED_STEPS
CASES: dict[str, Case] = {
    **{f"{count} running": Case(num_running=count, num_steps=_NUM_STEPS) for count in (1, 32, 256, 1024)},
    "256 running, 10000 waiting": Case(num_running=256, num_waiting=10_000, num_steps=_NUM_STEPS),
    "256 running, 10000 waiting, fair": Case(num_running=256, num_waiting=10_000, policy="fair", num_steps=_NUM_STEPS),
    "32 running, 4 start and end": Case(num_running=32, num_steps=_NUM_STEPS),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Per step. `peak_bytes`: the most that a step had allocated at once, beyond what it keeps."""

    lines: float
    calls: float
    compiled_calls: float
    peak_bytes: float


def count(name: str) -> Counts:
    """Count the case `name` of `CASES`."""
    case = CASES[name]
    with decode_steps(case) as steps:
        steps.line.mailbox._next_care_s = float("inf")  # looking after fronts happens by the clock
        turn = _churn(steps) if "start and end" in name else lambda: _step(steps)
        for _ in range(NUM_SETTLING_STEPS):
            turn()
        tracer = _Tracer()
        for _ in range(NUM_COUNTED_STEPS):
            tracer.run(turn)
            steps.read()
        peaks = [_peak_bytes(turn, steps.read) for _ in range(NUM_COUNTED_STEPS)]
    return Counts(
        lines=tracer.num_lines / NUM_COUNTED_STEPS,
        calls=tracer.num_calls / NUM_COUNTED_STEPS,
        compiled_calls=tracer.num_compiled_calls / NUM_COUNTED_STEPS,
        peak_bytes=sum(peaks) / NUM_COUNTED_STEPS,
    )


def _step(steps: DecodeSteps) -> None:
    steps.receive()
    plan = steps.plan()
    steps.prepare(plan)
    steps.publish(steps.settle(plan, steps.run()))


def _churn(steps: DecodeSteps) -> Callable[[], None]:
    """Steps in which as many requests start and end as keeps the rows full."""
    for row in range(steps.case.num_running):
        steps.scheduler.cancel(int(steps.scheduler.handles[row]))
    per_step = steps.case.num_running // CHURN_TOKENS

    def turn() -> None:
        for _ in range(per_step):
            steps.submit(CHURN_TOKENS)
        _step(steps)

    for _ in range(2 * CHURN_TOKENS):
        turn()
    return turn


class _Tracer:
    """Counts what the interpreter executes while it runs something."""

    def __init__(self) -> None:
        self.num_lines = self.num_calls = self.num_compiled_calls = 0

    def run(self, turn: Callable[[], None]) -> None:
        gc.disable()
        sys.setprofile(self._profile)
        sys.settrace(self._trace)
        try:
            turn()
        finally:
            sys.settrace(None)
            sys.setprofile(None)
            gc.enable()

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.num_lines += event == "line"
        return self._trace

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        self.num_calls += event == "call"
        self.num_compiled_calls += event == "c_call"


def _peak_bytes(turn: Callable[[], None], afterwards: Callable[[], None]) -> int:
    tracemalloc.start()
    try:
        turn()
        kept, peak = tracemalloc.get_traced_memory()
        afterwards()
    finally:
        tracemalloc.stop()
    return peak - kept


def read_baseline() -> dict[str, Counts]:
    entries = json.loads(BASELINE.read_text(encoding="utf-8"))
    return {name: Counts(**entry) for name, entry in entries.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {BASELINE.name}")
    arguments = parser.parse_args()
    names = [item.name for item in fields(Counts)]
    print(f"{'per step':<34}" + "".join(f"{name:>16}" for name in names))
    found = {}
    for name in CASES:
        found[name] = count(name)
        print(f"{name:<34}" + "".join(f"{getattr(found[name], item):>16.1f}" for item in names), flush=True)
    if arguments.write:
        entries = {name: asdict(counts) for name, counts in found.items()}
        BASELINE.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
