"""What a decode step costs besides the model: scheduling, input preparation, settling, sending to the front.

    python perf/host_cost.py [--running 1 32 256 1024] [--steps 400] [--vllm-python PYTHON]

Runs the product's own parts with a runner that prepares the inputs of every step and answers at once: prefix cache on,
prompts of random ids, pure decode steps, real sockets to a front in the same process whose reading is not counted. Each
time is the median over the steps in microseconds. One more line has thousands of requests waiting behind the running
ones. With `--vllm-python` (an interpreter with vLLM installed) vLLM's V1 scheduler is measured at the same numbers,
in turns with this one, because the machine's speed drifts; its time is `schedule()` + `update_from_output()` alone,
ours is printed both like that (plan + settle) and whole. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `perf` is not installed, and this may run as a script

from perf.decode_steps import Case, decode_steps

NUM_SETTLING_STEPS = 16
"""Decode steps that are not counted: caches of the processor and of the allocator fill."""
PARTS = ("receive", "plan", "prepare", "publish", "settle")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Medians in microseconds of a decode step's parts; `mean` is of the whole, garbage collection included."""

    receive: float
    plan: float
    prepare: float
    publish: float
    settle: float
    total: float
    mean: float

    @property
    def scheduling(self) -> float:
        return self.plan + self.settle


def measure(case: Case) -> Cost:
    """Run one case: prompts first, then the counted decode steps, in which nothing starts or ends."""
    times: dict[str, list[float]] = {part: [] for part in PARTS}
    with decode_steps(replace(case, num_steps=NUM_SETTLING_STEPS + case.num_steps)) as steps:
        gc.collect()
        gc.freeze()
        for step in range(NUM_SETTLING_STEPS + case.num_steps):
            begin_s = time.perf_counter()
            steps.receive()
            received_s = time.perf_counter()
            plan = steps.plan()
            planned_s = time.perf_counter()
            steps.prepare(plan)
            prepared_s = time.perf_counter()
            result = steps.run()
            ran_s = time.perf_counter()
            events = steps.settle(plan, result)
            settled_s = time.perf_counter()
            steps.publish(events)
            published_s = time.perf_counter()
            steps.read()
            assert len(plan.rows) == case.num_running == plan.num_tokens
            if step >= NUM_SETTLING_STEPS:
                times["receive"].append(received_s - begin_s)
                times["plan"].append(planned_s - received_s)
                times["prepare"].append(prepared_s - planned_s)
                times["settle"].append(settled_s - ran_s)
                times["publish"].append(published_s - settled_s)
        gc.unfreeze()
    totals = [sum(parts) for parts in zip(*times.values(), strict=True)]
    medians = {part: 1e6 * statistics.median(values) for part, values in times.items()}
    return Cost(**medians, total=1e6 * statistics.median(totals), mean=1e6 * statistics.fmean(totals))


def measure_vllm(python: str, case: Case) -> float:
    """vLLM's `schedule()` + `update_from_output()` at the same case: median in microseconds."""
    script = Path(__file__).with_name("host_cost_vllm.py")
    arguments = [case.num_running, case.prompt_len, case.num_steps, case.block_size]
    command = [python, str(script), *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr[-2000:]}")
    return float(json.loads(run.stdout.splitlines()[-1])["median_us"])


def better(one: Cost | None, other: Cost) -> Cost:
    """Of two measurements of the same case the one that was disturbed less."""
    return other if one is None or other.total < one.total else one


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--running", type=int, nargs="+", default=[1, 32, 256, 1024], help="sequences that decode")
    parser.add_argument(
        "--waiting", type=int, default=10_000, help="requests behind the running ones, in an extra line"
    )
    parser.add_argument(
        "--waiting-running", type=int, default=256, help="running sequences of that line; 0 leaves it out"
    )
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens")
    parser.add_argument("--steps", type=int, default=400, help="decode steps that are counted")
    parser.add_argument("--block-size", type=int, default=16, help="tokens in a block, for both")
    parser.add_argument("--repeats", type=int, default=2, help="runs of every case, in turns; the quickest counts")
    parser.add_argument("--vllm-python", default="", help="interpreter with vLLM, to run its scheduler beside this one")
    parser.add_argument("--record", action="store_true", help="in turns with recording the run, to see what that costs")
    arguments = parser.parse_args()
    shape = {"prompt_len": arguments.prompt, "num_steps": arguments.steps, "block_size": arguments.block_size}
    cases = [Case(num_running=count, **shape) for count in arguments.running]
    if arguments.waiting_running:
        cases.append(Case(num_running=arguments.waiting_running, num_waiting=arguments.waiting, **shape))
    if arguments.record:
        cases = [variant for case in cases for variant in (case, replace(case, recorded=True))]
    ours: dict[Case, Cost] = {}
    theirs: dict[Case, float] = {}
    num_runs, done = arguments.repeats * len(cases), 0
    for _ in range(arguments.repeats):
        for case in cases:
            done += 1
            print(f"\r{done}/{num_runs}: {case.num_running} running", end="", file=sys.stderr, flush=True)
            ours[case] = better(ours.get(case), measure(case))
            if arguments.vllm_python and not case.num_waiting and not case.recorded:
                theirs[case] = min(theirs.get(case, float("inf")), measure_vllm(arguments.vllm_python, case))
    print(file=sys.stderr)
    print(f"microseconds per decode step, prompt {arguments.prompt}, median of {arguments.steps} steps")
    names = (*PARTS, "total", "mean", "plan+settle", "vLLM", "ratio")
    print(f"{'running':>8} {'waiting':>8} {'recorded':>8} " + " ".join(f"{name:>11}" for name in names))
    lines = []
    for case in cases:
        cost, peer = ours[case], theirs.get(case)
        ratio = None if peer is None else peer / cost.total
        values = (*(getattr(cost, part) for part in PARTS), cost.total, cost.mean, cost.scheduling, peer, ratio)
        shown = " ".join(f"{'-' if value is None else f'{value:.1f}':>11}" for value in values)
        print(f"{case.num_running:>8} {case.num_waiting:>8} {case.recorded:>8} {shown}")
        entry = {**asdict(case), **asdict(cost), "plan_and_settle": cost.scheduling}
        if peer is not None:
            entry |= {"vllm_scheduler": peer, "vllm_over_total": ratio, "vllm_over_scheduling": peer / cost.scheduling}
        lines.append({key: round(value, 2) if isinstance(value, float) else value for key, value in entry.items()})
    print(json.dumps({"benchmark": "host_cost", "unit": "us", "cases": lines}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
