"""What Ray costs at each step, the table of docs/machines.md.

    PYTHONPATH=tests/runners python tests/ranks/measure_ray.py

Two ranks of a tiny engine on this machine answer a stream alone, started by the core and by Ray, in turns within one
run. The third line has Ray's client in the process of the core, with a thread that waits for an actor, instead of in a
driver of its own (`ranks.ray_driver`).
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import ray
from engines import MAX_LEN, make_checkpoint, make_engine, serve_on
from ray_cluster import RayCluster

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig
from pageflight.core.request import Request, SamplingParams
from pageflight.runners.factory import load_engine

NUM_ROUNDS, NUM_STREAMS, NUM_TOKENS = 5, 4, MAX_LEN - 10


def step_ms(engine_dir: Path, launcher: str, address: str) -> float:
    """Median over some streams."""
    scheduler = SchedulerConfig(max_num_tokens=64, max_num_seqs=8, max_model_len=MAX_LEN)
    config = EngineConfig(
        kv=KVConfig(num_blocks=64),
        scheduler=scheduler,
        num_threads=1,
        tensor_parallel=2,
        launcher=launcher,  # type: ignore[arg-type]
        ray_address=address,
        rank_wait_s=60.0,
    )
    engine = load_engine(engine_dir, config)
    taken_s = []
    for number in range(NUM_STREAMS):
        asked = Request(handle=number, prompt_ids=(number + 2, 3), sampling=SamplingParams(max_tokens=NUM_TOKENS))
        begun_s = time.monotonic()
        serve_on(engine, scheduler, [asked])
        taken_s.append(time.monotonic() - begun_s)
    engine.runner.close()
    return 1000 * statistics.median(taken_s) / NUM_TOKENS


def be_a_driver(address: str) -> None:
    """Ray's client with an actor that is waited for, in this process."""

    class Sleeper:
        def run(self) -> None:
            time.sleep(3600)

    ray.init(address=address, log_to_driver=False, configure_logging=False)
    end = ray.remote(Sleeper).options(num_cpus=0).remote().run.remote()
    threading.Thread(target=ray.wait, args=([end],), daemon=True).start()


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="ray") as name:
        folder = Path(name)
        make_checkpoint(folder / "checkpoint")
        engine_dir = make_engine(folder / "checkpoint", folder / "engine", "torch")
        cluster = RayCluster("to measure")
        try:
            taken_ms: dict[str, list[float]] = {"local": [], "ray": [], "local, Ray's client in the core": []}
            for round_ in range(NUM_ROUNDS + 1):
                for launcher in ("local", "ray"):
                    found = step_ms(engine_dir, launcher, cluster.address)
                    print(f"{launcher}: {found:.2f} ms", file=sys.stderr)
                    if round_:  # the first one warms up
                        taken_ms[launcher].append(found)
            be_a_driver(cluster.address)
            taken_ms["local, Ray's client in the core"] = [
                step_ms(engine_dir, "local", cluster.address) for _ in range(NUM_ROUNDS)
            ]
        finally:
            cluster.close()
    base = statistics.median(taken_ms["local"])
    for launcher, found_ms in taken_ms.items():
        median = statistics.median(found_ms)
        print(f"| {launcher} | {median:.2f} ms | {median / base:.2f} | {min(found_ms):.2f} to {max(found_ms):.2f} ms |")


if __name__ == "__main__":
    main()
