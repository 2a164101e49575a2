"""The engine alone: scheduler and runner in one process, without Triton, sockets or text, under closed-loop load.

    python -m perf.engine_alone --engine REPOSITORY_OR_ENGINE_DIR --plan uniq:8:32:128:64 shared:8:32:512+32:32

Every request asks for exactly `output` tokens. Prints the machine's ceiling first, then one line of JSON for every item
of the plan, with the ceiling of its workload beside its tokens/s. `--deterministic` runs every item without and with
that setting in turns: a second line then has the share of the first's tokens/s that is left (`of_free`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `perf` is not installed, and this may run as a script

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig
from pageflight.core.manifest import EngineManifest
from pageflight.core.plan import StepEvents, StepPlan
from pageflight.core.request import Request, SamplingParams
from pageflight.models.config import DecoderConfig
from pageflight.runners.factory import LoadedEngine, load_engine
from pageflight.sched.scheduler import Scheduler
from perf import ceiling, figures
from perf.workload import DEFAULT_PLAN, WARM_UP_PLAN, WARM_UP_SEED, Workload


class Load:
    """Drives a scheduler and a runner step by step, with new requests as old ones finish."""

    def __init__(self, engine: LoadedEngine, scheduler: Scheduler, *, ahead: bool) -> None:
        self._engine, self._scheduler, self._ahead = engine, scheduler, ahead
        self._next_handle = 0
        self.num_steps = 0
        self.host_s = 0.0

    def close(self) -> None:
        self._engine.runner.close()

    def run(self, workload: Workload, seed: int) -> list[figures.Answer]:
        """Answers in the order in which they were sent."""
        prompts = iter(workload.prompts(self._engine.manifest.vocab_size, seed))
        sampling = SamplingParams(max_tokens=workload.num_output)
        answers: dict[int, figures.Answer] = {}
        self.num_steps, self.host_s = 0, 0.0

        def send() -> None:
            prompt = next(prompts, None)
            if prompt is None:
                return
            now_s = time.perf_counter()
            answers[self._next_handle] = figures.Answer(now_s, num_input=len(prompt))
            request = Request(handle=self._next_handle, prompt_ids=tuple(prompt), sampling=sampling, arrival_s=now_s)
            self._scheduler.submit(request, now_s)
            self._next_handle += 1

        for _ in range(workload.concurrency):
            send()
        planned: StepPlan | None = None
        while self._scheduler.has_work:
            begin_s = time.perf_counter()
            plan = planned or self._scheduler.plan(begin_s)
            assert plan is not None, "work is open but nothing can run"
            self._engine.runner.submit(plan)
            started_s = time.perf_counter()
            planned = self._scheduler.plan(started_s) if self._ahead else None
            result = self._engine.runner.collect()
            done_s = time.perf_counter()
            events = self._scheduler.settle(plan, result, done_s)
            self._note(events, answers, done_s, send)
            self.host_s += started_s - begin_s + time.perf_counter() - done_s
            self.num_steps += 1
        return list(answers.values())

    def _note(
        self, events: StepEvents, answers: dict[int, figures.Answer], now_s: float, send: Callable[[], None]
    ) -> None:
        for handle in events.handles.tolist():
            answers[handle].arrivals_s.append(now_s)
            answers[handle].num_output += 1
        for finished in events.finished:
            assert finished.reason == "length", f"request {finished.handle} ended with {finished.reason}"
            send()


def measure(load: Load, workload: Workload, seed: int) -> figures.Record:
    """Run one workload. `host_us_per_step`: time in which no step was computing."""
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    answers = load.run(workload, seed)
    wall_s, cpu_s = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
    record = figures.summarise(workload, answers, wall_s=wall_s, cpu_s=cpu_s, seed=seed)
    return record | {"steps": load.num_steps, "host_us_per_step": round(load.host_s / load.num_steps * 1e6, 1)}


def weights_of(manifest: EngineManifest) -> ceiling.Weights:
    """The matrices of an engine, by the shape it was built for."""
    config = DecoderConfig.from_json(manifest.model)
    attention = config.hidden_size * 2 * (config.q_size + config.kv_size)
    return ceiling.Weights(
        name=manifest.name,
        num_layer_parameters=config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size),
        num_head_parameters=config.vocab_size * config.hidden_size,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True, help="built repository, or its engine directory")
    parser.add_argument("--plan", nargs="+", default=list(DEFAULT_PLAN), help="kind:concurrency:requests:prompt:output")
    parser.add_argument("--label", default="pageflight-engine")
    parser.add_argument("--threads", type=int, default=0, help="compute threads; 0: all cores")
    parser.add_argument("--max-num-tokens", type=int, default=SchedulerConfig().max_num_tokens)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--kv-memory", type=int, default=0, help="bytes; 0: from free memory")
    parser.add_argument("--no-prefix-cache", action="store_true")
    parser.add_argument("--deterministic", action="store_true", help="measure every item without and with it, in turns")
    parser.add_argument("--ahead", action="store_true", help="plan the next step while one runs")
    parser.add_argument("--repeat", type=int, default=1, help="runs of every item; the median by tokens/s is reported")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    return parser.parse_args()


def make_load(engine: LoadedEngine, config: SchedulerConfig, *, ahead: bool) -> Load:
    """A scheduler for `engine`, warmed up."""
    limits = engine.runner.limits
    settings = replace(
        config,
        max_model_len=limits.max_model_len,
        token_tile=limits.token_tile,
        replay_rows=limits.replay_rows,
    )
    load = Load(engine, Scheduler(settings, engine.capacity.kv, vocab_size=limits.vocab_size), ahead=ahead)
    for number, item in enumerate(WARM_UP_PLAN):
        load.run(Workload.parse(item), WARM_UP_SEED + number)
    return load


def median_run(runs: list[figures.Record]) -> figures.Record:
    """The run whose tokens/s are the median, with those of all."""
    median = statistics.median_low([run["tok_s"] for run in runs])
    return next(run for run in runs if run["tok_s"] == median) | {"runs_tok_s": [run["tok_s"] for run in runs]}


def main() -> None:
    options = arguments()
    engine_dir = options.engine / "engine" / "1" / "artifacts"
    engine_dir = engine_dir if engine_dir.is_dir() else options.engine
    kv = KVConfig(memory_bytes=options.kv_memory, prefix_cache=not options.no_prefix_cache)
    loads: list[Load] = []
    for deterministic in (False, True) if options.deterministic else (False,):
        scheduler = SchedulerConfig(
            max_num_tokens=options.max_num_tokens, max_num_seqs=options.max_num_seqs, deterministic=deterministic
        )
        begin_s = time.perf_counter()
        engine = load_engine(engine_dir, EngineConfig(kv=kv, scheduler=scheduler, num_threads=options.threads))
        manifest, limits = engine.manifest, engine.runner.limits
        print(
            f"{manifest.name}: {manifest.lowering} {manifest.dtype}, kv {manifest.kv_dtype}, {engine.num_threads}"
            f" threads, {limits.num_blocks} blocks of {limits.block_size} ({engine.capacity.reason}),"
            f" {deterministic=}, loaded in {time.perf_counter() - begin_s:.1f} s"
        )
        loads.append(make_load(engine, scheduler, ahead=options.ahead))
    weights, weight_type = weights_of(manifest), ceiling.WeightType(manifest.dtype)
    machine = ceiling.measure(engine.num_threads, [weight_type])
    print(
        f"reads {machine.read_bytes_per_s / 1e9:.1f} GB/s, "
        f"multiplies {machine.flops_per_s[weight_type] / 1e9:.0f} GFLOP/s; "
        f"{weights.step_bytes(weight_type) / 1e6:.1f} MB of weights per step"
    )
    for number, item in enumerate(options.plan):
        workload = Workload.parse(item)
        seeds = [options.seed + number + 1000 * turn for turn in range(options.repeat)]
        turns = [[measure(load, workload, seed) for load in loads] for seed in seeds]
        bound = ceiling.tokens_per_s(machine, weights, weight_type, workload)
        medians = [median_run(list(runs)) for runs in zip(*turns, strict=True)]
        for run, deterministic in zip(medians, (False, True), strict=False):
            record = {
                "label": options.label,
                "model": manifest.name,
                "dtype": manifest.dtype,
                "kv_dtype": manifest.kv_dtype,
                "max_num_tokens": options.max_num_tokens,
                "deterministic": deterministic,
                **run,
                "of_free": round(run["tok_s"] / medians[0]["tok_s"], 3),
                "ceiling_tok_s": round(bound, 1),
                "of_ceiling": round(run["tok_s"] / bound, 3),
                **figures.machine(),
            }
            print(json.dumps(record), flush=True)
            if options.out is not None:
                figures.append(options.out, record)
    for load in loads:
        load.close()


if __name__ == "__main__":
    main()
