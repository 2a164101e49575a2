"""How many streamed responses a second go through Triton when the engine costs nothing, and whose time they take.

    python -m perf.responses --checkpoint CHECKPOINT [--step-ms 100 50 25 0] [--streams 256]

A repository with an instant engine (`runners.fake.InstantRunner`) is served for real and asked over one gRPC stream.
Its steps sleep, so that so many tokens a second are offered: `streams` ÷ step time. Tokens that come faster than they
can be sent are joined; the figure is the most responses a second. `bare` is the ceiling: a Triton model that only sends
(perf/bare), with the same tensors, server and client. For every case one JSON line: tokens and responses a second, the
share of tokens that travelled alone, and the processor time per response of server, stub, core and client.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pageflight.cli.tritonserver import server_command
from pageflight_build.triton_config import Deployment, write_repository
from perf import figures, load, processes
from perf.sides import ROOT, Child, build_repository, pageflight_command, start_triton
from perf.workload import Workload

BARE = ROOT / "perf" / "bare"
VOCAB_SIZE = 256
UNPACED = 1_000_000_000
"""A response rate that never binds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`step_s` of the instant engine, None for the bare model; `response_rate` as the build option."""

    label: str
    step_s: float | None
    response_rate: int = UNPACED


def measure(case: Case, repository: Path, log: Path, workload: Workload, repeat: int) -> figures.Record:
    """Serve one case and drive it; the run with the median of responses a second."""
    child, address = _start(case, repository, log)
    try:
        name = "bare" if case.step_s is None else "engine"
        model = load.find_model(address, name, tokenizer="", timeout_s=60)
        warm_up = Workload.parse("uniq:16:64:16:16")
        load.run(address, model, warm_up, vocab_size=VOCAB_SIZE, seed=1, tokenizer="")
        runs = []
        for number in range(repeat):
            before = _cpu_s(child)
            record = load.run(address, model, workload, vocab_size=VOCAB_SIZE, seed=2 + number, tokenizer="")
            after = _cpu_s(child)
            runs.append(_with_shares(record, {role: after[role] - before[role] for role in after}))
    finally:
        child.stop()
    runs.sort(key=lambda record: float(record["responses_s"]))
    return runs[len(runs) // 2]


def _start(case: Case, repository: Path, log: Path) -> tuple[Child, str]:
    if case.step_s is not None:
        return start_triton([*pageflight_command(), "serve", str(repository)], log)
    server = server_command(BARE)
    further = ("--http-port", "--grpc-port", "--metrics-port", "--http-address", "--grpc-address", "--metrics-address")
    command = [word for word in server.arguments if not word.startswith(further)]
    command += ["--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1"]
    return start_triton(command, log, host_option="--http-address", environment=server.added_environment)


def _cpu_s(child: Child) -> dict[str, float]:
    """Processor time so far by role."""
    seconds: dict[str, float] = defaultdict(float)
    for sample in processes.tree(child.process.pid):
        seconds[sample.life.role] += sample.cpu_s
    return seconds


def _with_shares(record: figures.Record, cpu_s: dict[str, float]) -> figures.Record:
    responses = record["responses"]
    num_tokens = record["nreq"] * record["output"]
    cpu_us = {role: round(seconds / responses * 1e6, 1) for role, seconds in sorted(cpu_s.items()) if seconds >= 0.05}
    cpu_us["client"] = round(record["client_cpu_s"] / responses * 1e6, 1)
    ours = sum(us for role, us in cpu_us.items() if role == "core" or role.startswith("stub"))
    return {
        **record,
        "responses_s": round(responses / record["wall_s"], 1),
        "tokens_per_response": round(num_tokens / responses, 2),
        "cpu_us_per_response": cpu_us,
        "our_share": round(ours / sum(cpu_us.values()), 3),
    }


def make_repository(folder: Path, built: Path, case: Case, num_streams: int) -> Path:
    """The models of `built` around an instant engine."""
    assert case.step_s is not None
    fake = {"kind": "instant", "vocab_size": VOCAB_SIZE, "first_id": 2, "step_s": case.step_s, "num_blocks": 1 << 16}
    deployment = Deployment(
        name="bench",
        max_num_seqs=num_streams,
        max_num_tokens=16 * num_streams,  # no prompt waits for a step of its own
        response_rate=case.response_rate,
        fake_engine=json.dumps(fake),
        kv_memory=1 << 28,
    )
    write_repository(folder, deployment)
    artifacts = folder / "engine" / "1" / "artifacts"
    artifacts.symlink_to((built / "engine" / "1" / "artifacts").resolve(), target_is_directory=True)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="whose tokenizer is used")
    parser.add_argument("--step-ms", type=float, nargs="+", default=[100.0, 50.0, 25.0, 12.5, 0.0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64, help="of every answer")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("perf/results/responses.jsonl"))
    arguments = parser.parse_args()
    workload = Workload.parse(f"uniq:{arguments.streams}:{arguments.requests}:16:{arguments.tokens}")
    cases = [Case(label="bare", step_s=None)]
    cases += [Case(label=f"engine, step {ms:g} ms", step_s=ms / 1e3) for ms in arguments.step_ms]
    cases.append(Case(label="engine, step 50 ms, default response rate", step_s=0.05, response_rate=0))
    ceiling = 0.0
    with tempfile.TemporaryDirectory(prefix="responses-") as scratch:
        work = Path(scratch)
        build_repository(arguments.checkpoint, work / "built", "fp32", 1)
        for number, case in enumerate(cases):
            repository = work / f"case{number}"
            if case.step_s is not None:
                make_repository(repository, work / "built", case, arguments.streams)
            record = measure(case, repository, work / f"case{number}.log", workload, arguments.repeat)
            ceiling = ceiling or record["responses_s"]
            offered = round(arguments.streams / case.step_s, 1) if case.step_s else None
            record = {"benchmark": "responses", "label": case.label, "offered_tok_s": offered, **record}
            record |= {"of_bare": round(record["responses_s"] / ceiling, 3), **figures.machine()}
            print(json.dumps(record), flush=True)
            figures.append(arguments.out, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
