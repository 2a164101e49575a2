"""Compares this project with other engines in one session, alternating between them from workload to workload.

    python -m perf.compare_peers --peers-dir PEERS --model bench-llama-0.5b --work-dir WORK

All engines are started, then every workload is run on each of them in turn, and the whole plan several times with
another engine first each time: what drifts (a noisy neighbour, the clock rate) hits all alike. perf/README.md says how
PEERS must look. Prints a line of JSON for every run, then one for every engine and workload with the medians, the
ceiling and the ratio to the best peer.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import psutil  # type: ignore[import-untyped]
import typer

from perf import ceiling, figures
from perf.sides import EngineSide, GenaiSide, Side, SideError, TritonSide, VllmSide
from perf.workload import DEFAULT_PLAN, WARM_UP_PLAN, WARM_UP_SEED, Kind, Workload

SIDES = (
    "pageflight-bf16",
    "pageflight-int8",
    "engine-bf16",
    "engine-int8",
    "vllm-bf16",
    "vllm-w8a8",
    "genai-bf16",
    "genai-int8",
)
PREFIX_SUFFIX = "-prefix"  # GenAI is faster without its prefix cache where nothing is shared: it gets both


def make_sides(names: Sequence[str], *, peers_dir: Path, model: str, work_dir: Path, kv_gib: int) -> list[Side]:
    """Raises ValueError for an unknown name."""
    checkpoint = peers_dir / "models" / model
    vocab_size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    sides: list[Side] = []
    for name in names:
        if name not in SIDES:
            raise ValueError(f"{name!r} is none of {', '.join(SIDES)}")
        engine, _, precision = name.partition("-")
        weights = "bf16" if precision == "bf16" else "int8"
        repository = work_dir / f"{model}-{weights}"
        if engine == "pageflight":
            sides.append(TritonSide(name, weights, checkpoint, repository, kv_gib, vocab_size))
        elif engine == "engine":
            sides.append(EngineSide(name, weights, checkpoint, repository, kv_gib))
        elif engine == "vllm":
            folder = model if weights == "bf16" else f"{model}-w8a8"
            sides.append(VllmSide(name, weights, peers_dir, folder, kv_gib, vocab_size))
        else:
            folder = f"{model}-{'fp16' if weights == 'bf16' else 'int8'}"
            sides.append(
                GenaiSide(name, weights, peers_dir, folder, kv_gib, prefix_cache=False, kinds=frozenset({Kind.uniq}))
            )
            sides.append(
                GenaiSide(
                    name + PREFIX_SUFFIX,
                    weights,
                    peers_dir,
                    folder,
                    kv_gib,
                    prefix_cache=True,
                    kinds=frozenset({Kind.shared}),
                )
            )
    return sides


def median_record(runs: Sequence[figures.Record]) -> figures.Record:
    """The run with the median tokens/s (the lower of two), and the tokens/s of all."""
    median = statistics.median_low([float(run["tok_s"]) for run in runs])
    chosen = next(run for run in runs if run["tok_s"] == median)
    lengths_ok = all(run.get("out_ok", True) and run.get("in_ok", True) for run in runs)
    return {**chosen, "runs_tok_s": [run["tok_s"] for run in runs], "lengths_ok": lengths_ok}


def with_ratios(medians: Sequence[tuple[Side, figures.Record]]) -> list[figures.Record]:
    """Adds to our figures of one workload how they compare with the best peer, the best served one, and ourselves."""
    records = []
    for side, record in medians:
        ratios: figures.Record = {}
        rivals = [(peer, r["tok_s"]) for peer, r in medians if not peer.is_ours and peer.weights == side.weights]
        if side.is_ours and rivals:
            best, best_tok_s = max(rivals, key=lambda rival: rival[1])
            ratios |= {"best_peer": best.label, "to_best_peer": round(record["tok_s"] / best_tok_s, 3)}
            served = [tok_s for peer, tok_s in rivals if peer.is_served]
            if served:
                ratios["to_best_served_peer"] = round(record["tok_s"] / max(served), 3)
        alone = [r["tok_s"] for s, r in medians if s.is_ours and not s.is_served and s.weights == side.weights]
        if side.is_ours and side.is_served and alone:
            ratios["triton_tax"] = round(alone[0] / record["tok_s"], 3)
        records.append({**record, **ratios})
    return records


def run_all(
    sides: Sequence[Side], workloads: Sequence[Workload], *, repeat: int, seed: int, out: Path, model: str
) -> dict[tuple[str, str], list[figures.Record]]:
    """Runs everything, alternating; appends and prints each run. The runs of each (workload, side)."""
    runs: dict[tuple[str, str], list[figures.Record]] = {}
    for turn in range(repeat):
        order = [*sides[turn % len(sides) :], *sides[: turn % len(sides)]]
        for number, workload in enumerate(workloads):
            for side in order:
                if workload.kind not in side.kinds:
                    continue
                record = side.measure(workload, (seed + turn) * 100 + number)
                record = {**record, "label": side.label, "model": model, "record": "run", "turn": turn}
                print(json.dumps(record), flush=True)
                figures.append(out, record)
                runs.setdefault((str(workload), side.label), []).append(record)
    return runs


def warm_up(sides: Sequence[Side], seed: int) -> None:
    """Short rounds on every engine that stays; one that is started for each run warms itself up."""
    for side in sides:
        if isinstance(side, EngineSide):
            continue
        for number, item in enumerate(WARM_UP_PLAN):
            side.measure(Workload.parse(item), WARM_UP_SEED + seed * len(WARM_UP_PLAN) + number)


def main(
    peers_dir: Annotated[Path, typer.Option(help="Where the peers are installed; see perf/README.md.")],
    work_dir: Annotated[Path, typer.Option(help="Where our repositories are built, and logs are kept.")],
    model: Annotated[str, typer.Option(help="A checkpoint in PEERS/models.")] = "bench-llama-0.5b",
    sides: Annotated[str, typer.Option(help="Which engines.")] = " ".join(SIDES),
    plan: Annotated[str, typer.Option(help="kind:concurrency:requests:prompt:output …")] = " ".join(DEFAULT_PLAN),
    repeat: Annotated[int, typer.Option(min=1, help="Runs of the whole plan; medians are reported.")] = 3,
    kv_gib: Annotated[int, typer.Option(min=1, help="Memory of each engine's K/V cache.")] = 2,
    seed: Annotated[int, typer.Option(min=0)] = 1,
    out: Annotated[Path, typer.Option(help="The file that lines are appended to.")] = Path("perf/results/peers.jsonl"),
) -> None:
    """Run the comparison."""
    try:
        workloads = [Workload.parse(item) for item in plan.split()]
        chosen = make_sides(
            sides.split(), peers_dir=peers_dir.resolve(), model=model, work_dir=work_dir.resolve(), kv_gib=kv_gib
        )
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    limits = ceiling.measure(
        len(os.sched_getaffinity(0)), sorted({ceiling.WeightType(side.weights) for side in chosen}, key=str)
    )
    weights = ceiling.Weights.of_checkpoint(peers_dir / "models" / model)
    with contextlib.ExitStack() as stack:
        for side in chosen:
            typer.echo(f"starting {side.label}", err=True)
            stack.callback(side.stop)
            try:
                side.start()
            except SideError as error:
                typer.echo(f"error: {side.label}: {error}", err=True)
                raise typer.Exit(2) from None
        warm_up(chosen, seed)
        time.sleep(2)
        idle_cpu_percent = psutil.cpu_percent(interval=3)  # engines that wait should not compute
        runs = run_all(chosen, workloads, repeat=repeat, seed=seed, out=out, model=model)
    for workload in workloads:
        medians = [
            (side, median_record(runs[str(workload), side.label]))
            for side in chosen
            if (str(workload), side.label) in runs
        ]
        for (side, _), record in zip(medians, with_ratios(medians), strict=True):
            bound = ceiling.tokens_per_s(limits, weights, ceiling.WeightType(side.weights), workload)
            record |= {
                "record": "figure",
                "ceiling_tok_s": round(bound, 1),
                "of_ceiling": round(record["tok_s"] / bound, 3),
                "read_gb_s": round(limits.read_bytes_per_s / 1e9, 1),
                "gflop_s": round(limits.flops_per_s[ceiling.WeightType(side.weights)] / 1e9),
                "idle_cpu_percent": idle_cpu_percent,
            } | figures.machine()
            print(json.dumps(record), flush=True)
            figures.append(out, record)


if __name__ == "__main__":
    typer.run(main)
