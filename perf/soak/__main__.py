"""`python -m perf.soak --minutes 5`: see docs/verification.md."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from perf import figures
from perf.soak import report
from perf.soak.killer import KillPlan
from perf.soak.run import Plan, soak
from perf.soak.server import Deployment, SoakError
from perf.wire import WireError

DEMO = Path(__file__).resolve().parents[2] / "build" / "demo_checkpoint"
_MAX_MODEL_LEN = 1024


def main(
    minutes: Annotated[float, typer.Option(min=0.05, help="Length of the load; start and end come on top.")] = 5.0,
    checkpoint: Annotated[Path, typer.Option(help="Folder in Hugging Face format.")] = DEMO,
    clients: Annotated[int, typer.Option(min=1, help="Requests that are open at any time.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the load and of the kills.")] = 1,
    core_kill_every: Annotated[float, typer.Option(min=0, help="Mean seconds between kills of cores; 0: none.")] = 8.0,
    stub_kill_every: Annotated[float, typer.Option(min=0, help="The same of a Triton stub.")] = 35.0,
    calm_share: Annotated[float, typer.Option(min=0, max=1, help="Share of it without kills, at the end.")] = 0.6,
    warm_up: Annotated[float, typer.Option(min=0, help="Seconds of load before anything counts.")] = 20.0,
    idle: Annotated[float, typer.Option(min=0, help="Seconds without load before the server is looked at.")] = 5.0,
    hang_limit: Annotated[float, typer.Option(min=1, help="Seconds after which a request hangs.")] = 60.0,
    flat_kib_min: Annotated[float, typer.Option(min=0, help="Growth of a process that counts as flat.")] = 6144.0,
    kv_memory: Annotated[str, typer.Option(help="Of the K/V cache; small, so that it does not suffice.")] = "8MiB",
    host_kv_memory: Annotated[str, typer.Option(help="Of its second level.")] = "8MiB",
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Rows of the engine.")] = 8,
    max_queue_size: Annotated[int, typer.Option(min=2, help="Sequences that may wait.")] = 16,
    check_invariants: Annotated[int, typer.Option(min=0, help="Check the bookkeeping each so many steps.")] = 50,
    deterministic: Annotated[bool, typer.Option(help="Compare texts; needs a build that rules near-ties out.")] = True,
    build_option: Annotated[list[str] | None, typer.Option(help="Further argument of `pageflight build`.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Keep the server's log here.")] = None,
    out: Annotated[Path | None, typer.Option(help="Append the JSON line to this file.")] = None,
) -> None:
    """Mixed load against a real server whose processes are killed; ends with status 1 when a check fails."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    plan = Plan(
        minutes=minutes,
        clients=clients,
        seed=seed,
        kills=KillPlan(core_every_s=core_kill_every, stub_every_s=stub_kill_every),
        calm_share=calm_share,
        warm_up_s=warm_up,
        idle_s=idle,
        hang_limit_s=hang_limit,
        flat_kib_min=flat_kib_min,
        deployment=Deployment(
            checkpoint=checkpoint,
            name="demo" if checkpoint == DEMO else checkpoint.resolve().name,
            max_model_len=min(_MAX_MODEL_LEN, int(config["max_position_embeddings"])),
            kv_memory=kv_memory,
            host_kv_memory=host_kv_memory,
            max_num_seqs=max_num_seqs,
            max_queue_size=max_queue_size,
            check_invariants=check_invariants,
            deterministic=deterministic,
            further=tuple(build_option or ()),
        ),
    )
    begin_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as folder:
        log_file = Path(folder) / "server.log"
        try:
            result = soak(plan, Path(folder), log_file, lambda line: _tell(time.monotonic() - begin_s, line))
        except (SoakError, WireError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        finally:
            if keep is not None and log_file.exists():
                shutil.copy(log_file, keep)
    print(report.text(result))
    record = report.record(result)
    print(json.dumps(record), flush=True)
    if out is not None:
        figures.append(out, record)
    raise typer.Exit(0 if result.is_ok else 1)


def _tell(seconds: float, line: str) -> None:
    print(f"[{seconds:5.0f} s] {line}", flush=True)


if __name__ == "__main__":
    typer.run(main)
