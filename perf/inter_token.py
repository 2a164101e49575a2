"""Time between tokens of running streams, with and without long prompts coming in, for several targets.

    python -m perf.inter_token --engine REPOSITORY [--target 0 100] [--seconds 12]

Scheduler and engine without a server. `--streams` sequences always run; with prompts, one of `--prompt` tokens is
submitted as soon as the one before has been answered. Prints one JSON line per case: percentiles of the time between
tokens of the streams, tokens per second, and how long the prompts took to their first token.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig
from pageflight.core.manifest import EngineManifest
from pageflight.core.request import Request, SamplingParams
from pageflight.runners.factory import LoadedEngine, load_engine
from pageflight.sched.scheduler import Scheduler
from perf import figures

STREAM_PROMPT, STREAM_OUTPUT, PROMPT_OUTPUT = 64, 200, 4
WARM_UP_SHARE = 0.2


class Load:
    """Drives one scheduler; knows which sequences are streams and which are long prompts."""

    def __init__(self, engine: LoadedEngine, scheduler: Scheduler, *, num_prompt: int, seed: int, first: int) -> None:
        self._engine, self._scheduler, self._num_prompt = engine, scheduler, num_prompt
        self._random = np.random.default_rng(seed)
        self._next_handle = first
        self._streams: dict[int, float | None] = {}  # handle → when its last token came
        self._prompts: dict[int, float] = {}  # handle → when it was submitted
        self.gaps_ms: list[float] = []
        self.first_token_s: list[float] = []
        self.num_tokens = 0

    def run(self, seconds: float, num_streams: int, *, with_prompts: bool) -> None:
        begin_s = time.perf_counter()
        measure_from_s, end_s = begin_s + WARM_UP_SHARE * seconds, begin_s + seconds
        while (now_s := time.perf_counter()) < end_s:
            while len(self._streams) < num_streams:
                self._streams[self._submit(STREAM_PROMPT, STREAM_OUTPUT, now_s)] = None
            if with_prompts and not self._prompts:
                self._prompts[self._submit(self._num_prompt, PROMPT_OUTPUT, now_s)] = now_s
            self._step(measure_from_s)
        self._scheduler.end_all("cancelled")
        self._scheduler.take_endings()

    def _submit(self, num_prompt: int, num_output: int, now_s: float) -> int:
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        ids = self._random.integers(4, self._engine.manifest.vocab_size, num_prompt)
        sampling = SamplingParams(max_tokens=num_output)
        self._scheduler.submit(Request(handle=handle, prompt_ids=tuple(ids.tolist()), sampling=sampling), now_s)
        return handle

    def _step(self, measure_from_s: float) -> None:
        plan = self._scheduler.plan(time.perf_counter())
        assert plan is not None, "work is open but nothing can run"
        self._engine.runner.submit(plan)
        result = self._engine.runner.collect()
        now_s = time.perf_counter()
        events = self._scheduler.settle(plan, result, now_s)
        for handle in events.handles.tolist():
            self._note(handle, now_s, measure_from_s)
        for ending in events.finished:
            self._streams.pop(ending.handle, None)
            self._prompts.pop(ending.handle, None)

    def _note(self, handle: int, now_s: float, measure_from_s: float) -> None:
        if handle not in self._streams:
            submitted_s = self._prompts[handle]
            if submitted_s > 0:
                self.first_token_s.append(now_s - submitted_s)
                self._prompts[handle] = -1.0  # its first token has come
            return
        last_s, self._streams[handle] = self._streams[handle], now_s
        if now_s >= measure_from_s:
            self.num_tokens += 1
            if last_s is not None:
                self.gaps_ms.append(1000 * (now_s - last_s))


def measure(
    engine: LoadedEngine, config: SchedulerConfig, options: argparse.Namespace, target_ms: float, with_prompts: bool
) -> dict[str, object]:
    """One case on a scheduler that has learnt nothing yet."""
    scheduler = Scheduler(
        replace(config, target_inter_token_ms=target_ms), engine.capacity.kv, vocab_size=engine.runner.limits.vocab_size
    )
    load = Load(engine, scheduler, num_prompt=options.prompt, seed=options.seed, first=0)
    load.run(options.seconds, options.streams, with_prompts=with_prompts)
    p50, p99 = np.percentile(load.gaps_ms, [50, 99])
    return {
        "benchmark": "inter_token",
        "model": engine.manifest.name,
        "dtype": engine.manifest.dtype,
        "streams": options.streams,
        "prompt_tokens": options.prompt if with_prompts else 0,
        "target_ms": target_ms,
        "itl_p50_ms": round(float(p50), 1),
        "itl_p99_ms": round(float(p99), 1),
        "stream_tok_s": round(load.num_tokens / (options.seconds * (1 - WARM_UP_SHARE)), 1),
        "prompts_answered": len(load.first_token_s),
        "prompt_ttft_s": round(float(np.mean(load.first_token_s)), 2) if load.first_token_s else None,
        "seconds": options.seconds,
        **figures.machine(),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True, help="built repository, or its engine directory")
    parser.add_argument("--target", type=float, nargs="+", default=[0.0, 100.0], help="ms; 0: none")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=4000, help="tokens of a long prompt")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each case")
    parser.add_argument("--threads", type=int, default=0, help="compute threads; 0: all cores")
    parser.add_argument("--kv-memory", type=int, default=1 << 30, help="bytes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    engine_dir = options.engine / "engine" / "1" / "artifacts"
    engine_dir = engine_dir if engine_dir.is_dir() else options.engine
    wanted = SchedulerConfig(max_num_seqs=32, max_model_len=EngineManifest.read(engine_dir).max_model_len)
    config = EngineConfig(kv=KVConfig(memory_bytes=options.kv_memory), scheduler=wanted, num_threads=options.threads)
    for target_ms in options.target:
        for with_prompts in (False, True):
            # A runner counts plans from its first one, so every case has an engine of its own.
            engine = load_engine(engine_dir, config)
            limits = engine.runner.limits
            scheduler = replace(config.scheduler, max_model_len=limits.max_model_len, token_tile=limits.token_tile)
            record = measure(engine, scheduler, options, target_ms, with_prompts)
            engine.runner.close()
            print(json.dumps(record), flush=True)
            if options.out is not None:
                figures.append(options.out, record)


if __name__ == "__main__":
    main()
