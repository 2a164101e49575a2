"""The engine alone: scheduler and runner in one process, without Triton, sockets or text, under closed-loop load.

    python perf/engine_alone.py --engine REPOSITORY_OR_ENGINE_DIR --plan uniq:8:32:128:64 shared:8:32:512+32:32

An item of the plan is kind:concurrency:requests:prompt:output, as in the wire client's: `uniq` prompts share nothing,
`shared` ones (prompt P+U) share P tokens and have U of their own. Every request asks for exactly `output` tokens.
Prints the machine's ceiling first, then one line of JSON for every item.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as opset

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig
from pageflight.core.manifest import EngineManifest
from pageflight.core.plan import StepEvents, StepPlan
from pageflight.core.request import Request, SamplingParams
from pageflight.models.config import DecoderConfig
from pageflight.models.weights import EMBED
from pageflight.quant.store import WEIGHTS_NAME, WeightStore, scale_name
from pageflight.runners.factory import LoadedEngine, load_engine
from pageflight.sched.scheduler import Scheduler

DEFAULT_PLAN = (
    "uniq:1:8:128:64",
    "uniq:8:32:128:64",
    "uniq:32:96:128:64",
    "shared:8:32:512+32:32",
    "shared:32:32:512+32:32",
)


@dataclass(frozen=True, slots=True)
class Workload:
    """Closed loop: `concurrency` clients, each sending its next request when its last one is done."""

    kind: str
    concurrency: int
    num_requests: int
    prompt: str
    num_output: int

    @classmethod
    def parse(cls, item: str) -> Workload:
        kind, concurrency, num_requests, prompt, num_output = item.split(":")
        if kind not in ("uniq", "shared"):
            raise ValueError(f"{item!r}: kind must be uniq or shared")
        return cls(kind, int(concurrency), int(num_requests), prompt, int(num_output))

    def prompts(self, vocab_size: int, seed: int) -> list[tuple[int, ...]]:
        """The same token ids as the wire client makes from the same seed."""
        generator = random.Random(seed)

        def tokens(count: int) -> list[int]:
            return [generator.randrange(2, vocab_size) for _ in range(count)]

        parts = [int(part) for part in self.prompt.split("+")]
        head = tokens(parts[0]) if self.kind == "shared" else []
        return [tuple(head + tokens(sum(parts) - len(head))) for _ in range(self.num_requests)]


@dataclass(slots=True)
class Answer:
    """When the tokens of one request came; seconds of the process's monotonic clock."""

    sent_s: float
    stamps_s: list[float] = field(default_factory=list)


class Load:
    """Drives a scheduler and a runner step by step, with new requests as old ones finish."""

    def __init__(self, engine: LoadedEngine, scheduler: Scheduler, *, ahead: bool) -> None:
        self._engine, self._scheduler, self._ahead = engine, scheduler, ahead
        self._next_handle = 0
        self.num_steps = 0
        self.host_s = 0.0

    def run(self, workload: Workload, seed: int) -> list[Answer]:
        """Answers in the order in which they were sent."""
        prompts = iter(workload.prompts(self._engine.manifest.vocab_size, seed))
        sampling = SamplingParams(max_tokens=workload.num_output)
        answers: dict[int, Answer] = {}
        self.num_steps, self.host_s = 0, 0.0

        def send() -> None:
            prompt = next(prompts, None)
            if prompt is None:
                return
            now_s = time.perf_counter()
            answers[self._next_handle] = Answer(now_s)
            request = Request(handle=self._next_handle, prompt_ids=prompt, sampling=sampling, arrival_s=now_s)
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

    def _note(self, events: StepEvents, answers: dict[int, Answer], now_s: float, send: Callable[[], None]) -> None:
        for handle in events.handles.tolist():
            answers[handle].stamps_s.append(now_s)
        for finished in events.finished:
            assert finished.reason == "length", f"request {finished.handle} ended with {finished.reason}"
            send()


def percentile_ms(seconds: list[float], share: float) -> float:
    ordered = sorted(seconds)
    return round(ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))] * 1e3, 2)


def measure(load: Load, workload: Workload, seed: int) -> dict[str, object]:
    """Run one workload; times in milliseconds."""
    begin_s = time.perf_counter()
    answers = load.run(workload, seed)
    wall_s = time.perf_counter() - begin_s
    first = [answer.stamps_s[0] - answer.sent_s for answer in answers]
    whole = [answer.stamps_s[-1] - answer.sent_s for answer in answers]
    gaps = [answer.stamps_s[-1] - answer.stamps_s[0] for answer in answers]
    longest = [max(np.diff(answer.stamps_s), default=0.0) for answer in answers]
    assert all(len(answer.stamps_s) == workload.num_output for answer in answers), "an answer has another length"
    return {
        "kind": workload.kind,
        "conc": workload.concurrency,
        "nreq": workload.num_requests,
        "prompt": workload.prompt,
        "output": workload.num_output,
        "tok_s": round(len(answers) * workload.num_output / wall_s, 1),
        "wall_s": round(wall_s, 2),
        "ttft_p50_ms": percentile_ms(first, 0.5),
        "ttft_p99_ms": percentile_ms(first, 0.99),
        "tpot_p50_ms": percentile_ms([gap / max(1, workload.num_output - 1) for gap in gaps], 0.5),
        "e2e_p50_ms": percentile_ms(whole, 0.5),
        "maxgap_ms": round(float(max(longest)) * 1e3, 2),
        "steps": load.num_steps,
        "host_us_per_step": round(load.host_s / load.num_steps * 1e6, 1),
        "seed": seed,
    }


# ---- ceiling --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What memory and arithmetic of this machine allow, if nothing else cost anything."""

    read_bytes_per_s: float
    flops_per_s: float
    weight_bytes: int
    flops_per_token: int

    def tokens_per_s(self, workload: Workload) -> float:
        """Output tokens/s: every step reads the weights once for `concurrency` tokens; every token is multiplied.

        Attention, K/V traffic and the head's share of prompt tokens count as nothing; a shared prefix is computed once.
        """
        parts = [int(part) for part in workload.prompt.split("+")]
        num_prompt: float = sum(parts)
        if workload.kind == "shared":
            num_prompt = parts[1] + parts[0] / workload.num_requests
        read_s = self.weight_bytes / self.read_bytes_per_s / workload.concurrency
        multiply_s = self.flops_per_token / self.flops_per_s
        return 1.0 / (max(read_s, multiply_s) + multiply_s * num_prompt / workload.num_output)


def best_s(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin_s)
    return min(times[1:])


def measure_ceiling(engine_dir: Path, manifest: EngineManifest, num_threads: int) -> Ceiling:
    """Bandwidth and matrix product rate as measured here, bytes and operations as the engine's weights say."""
    config = DecoderConfig.from_json(manifest.model)
    records = WeightStore(engine_dir / WEIGHTS_NAME, config).file.records
    streamed = [record for name, record in records.items() if name != EMBED or config.tied_head]
    matrices = [
        records[name] for name in records if len(records[name].shape) == 2 and not name.endswith(scale_name(""))
    ]
    multiplied = [record for record in matrices if record in streamed]
    return Ceiling(
        measure_read_bytes_per_s(num_threads),
        measure_flops_per_s(manifest.dtype, num_threads),
        sum(record.end - record.begin for record in streamed),
        sum(2 * record.shape[0] * record.shape[1] for record in multiplied),
    )


def measure_read_bytes_per_s(num_threads: int) -> float:
    """Every thread scans its own 256 MB."""
    arrays = [np.ones(1 << 26, np.float32) for _ in range(num_threads)]

    def scan() -> None:
        threads = [threading.Thread(target=array.max) for array in arrays]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return sum(array.nbytes for array in arrays) / best_s(scan, 8)


def measure_flops_per_s(dtype: str, num_threads: int) -> float:
    """OpenVINO's product of two 2048 x 2048 matrices, in fp32 for an fp32 engine, else in bf16."""
    size = 2048
    weight = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    x = opset.parameter([-1, size], ov.Type.f32)
    settings = {
        "INFERENCE_PRECISION_HINT": "f32" if dtype == "fp32" else "bf16",
        "INFERENCE_NUM_THREADS": num_threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    product = opset.matmul(x, opset.constant(weight), False, True)
    compiled = ov.Core().compile_model(ov.Model([product], [x], "product"), "CPU", settings)
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(weight))
    return 2 * size**3 / best_s(request.infer, 8)


# ---- command --------------------------------------------------------------------------------------------------------


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
    parser.add_argument("--ahead", action="store_true", help="plan the next step while one runs")
    parser.add_argument("--repeat", type=int, default=1, help="runs of every item; the median by tokens/s is reported")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    engine_dir = options.engine / "engine" / "1" / "artifacts"
    engine_dir = engine_dir if engine_dir.is_dir() else options.engine
    config = EngineConfig(
        kv=KVConfig(memory_bytes=options.kv_memory, prefix_cache=not options.no_prefix_cache),
        scheduler=SchedulerConfig(max_num_tokens=options.max_num_tokens, max_num_seqs=options.max_num_seqs),
        num_threads=options.threads,
    )
    begin_s = time.perf_counter()
    engine = load_engine(engine_dir, config)
    manifest, limits = engine.manifest, engine.runner.limits
    print(
        f"{manifest.name}: {manifest.lowering} {manifest.dtype}, kv {manifest.kv_dtype}, {engine.num_threads} threads, "
        f"{limits.num_blocks} blocks of {limits.block_size} ({engine.capacity.reason}), "
        f"loaded in {time.perf_counter() - begin_s:.1f} s"
    )
    ceiling = measure_ceiling(engine_dir, manifest, engine.num_threads)
    print(
        f"reads {ceiling.read_bytes_per_s / 1e9:.1f} GB/s, multiplies {ceiling.flops_per_s / 1e9:.0f} GFLOP/s; "
        f"{ceiling.weight_bytes / 1e6:.1f} MB of weights per step, {ceiling.flops_per_token / 1e6:.0f} MFLOP per token"
    )
    scheduler = Scheduler(
        replace(config.scheduler, max_model_len=limits.max_model_len), engine.capacity.kv, vocab_size=limits.vocab_size
    )
    load = Load(engine, scheduler, ahead=options.ahead)
    for seed in range(2):
        load.run(Workload("uniq", 4, 8, "64", 8), 7_000_000 + options.seed + seed)
        load.run(Workload("uniq", 8, 8, "128", 8), 7_500_000 + options.seed + seed)
    for number, item in enumerate(options.plan):
        workload = Workload.parse(item)
        runs = [measure(load, workload, (options.seed + turn) * 100 + number) for turn in range(options.repeat)]
        median = statistics.median_low([float(str(run["tok_s"])) for run in runs])
        record = next(run for run in runs if run["tok_s"] == median)
        bound = ceiling.tokens_per_s(workload)
        record = {
            "label": options.label,
            "model": manifest.name,
            "dtype": manifest.dtype,
            "kv_dtype": manifest.kv_dtype,
            "max_num_tokens": options.max_num_tokens,
            **record,
            "runs_tok_s": [run["tok_s"] for run in runs],
            "ceiling_tok_s": round(bound, 1),
            "of_ceiling": round(median / bound, 3),
        }
        line = json.dumps(record)
        print(line, flush=True)
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
    engine.runner.close()


if __name__ == "__main__":
    main()
