"""What is left of the throughput when the K/V cache is smaller than the demand.

    python -m perf.cache_pressure                        # in virtual time, without a model
    python -m perf.cache_pressure --engine REPOSITORY

Many requests are submitted at once, so that something always waits for one of `--rows` rows: a `varied` crowd, or one
that is `growing` (short prompts, long answers: what fits when it starts does not fit later). A run in a cache that
fits shows the peak demand; then the same requests run in caches of `--share` of that peak, under every
`kv_admission`, without and with a host tier that has room for the peak. `known` answers have `max_tokens` tokens;
`open` ones end before it, as at a stop string, so that nobody can know how long they get.

In virtual time sides run one after another; real ones each have an engine, and alternate step by step, so that a
drift of the machine's speed is the same for all. All of it is done `--repeat` times, with other lengths and tokens
each; ratios are those within one turn, and their medians are reported. `of_fit`: output tokens per second ÷ those in
the cache that fits, whose ceiling is 1; `full_of_fit`: the same until the last request has started, without the end
in which the batch empties.

In virtual time the steps cost what `COSTS` says. With an engine, the costs of its own steps are fitted and printed.
Prints one JSON line per side.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `perf` is not installed, and this may run as a script

from pageflight.core.config import EngineConfig, KVAdmission, KVConfig, SchedulerConfig
from pageflight.core.request import Request, SamplingParams
from pageflight.loop.clock import ManualClock
from pageflight.runners.base import RunnerLimits
from pageflight.runners.factory import LoadedEngine, load_engine
from pageflight.sched.scheduler import Scheduler
from pageflight.sched.step_time import StepCosts, StepTime
from perf import figures
from perf.drive import Drive, Job, Run, Stopwatch, alternate
from perf.virtual_engine import VirtualRunner, load_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Of an engine's steps, and of copying a block to host memory or back."""

    steps: StepCosts
    copy_s: float


COSTS = {
    # Fitted by this program to a bf16 engine on two cores of an EPYC with bf16 arithmetic.
    "bench-llama-60m": Costs(
        steps=StepCosts(step_s=1.5e-3, row_s=2.4e-4, position_s=7.5e-7, token_s=6.9e-5, pair_s=1.1e-8), copy_s=1.2e-5
    ),
    # By the step times in perf/LOG.md (decoding 1, 8, 32 and 128 rows, and 512 tokens of a prompt), within a fifth.
    "bench-llama-0.5b": Costs(
        steps=StepCosts(step_s=2.1e-2, row_s=2e-4, position_s=2.5e-6, token_s=1.5e-3, pair_s=0.0), copy_s=1.5e-4
    ),
}
LIMIT = 1024  # `max_tokens` of open answers
LONGEST = 512  # tokens of a prompt, and of an answer
BLOCK_SIZE, VOCAB_SIZE = 32, 8192
MAX_MODEL_LEN = LONGEST + LIMIT


class Lengths(NamedTuple):
    """Tokens from `shortest` to `longest`, log-uniformly."""

    shortest: int
    longest: int

    def draw(self, rng: random.Random) -> int:
        return round(math.exp(rng.uniform(math.log(self.shortest), math.log(self.longest))))


CROWDS = {  # prompts, answers
    "varied": (Lengths(16, LONGEST), Lengths(16, LONGEST)),
    "growing": (Lengths(16, 64), Lengths(LONGEST // 2, LONGEST)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """Requests that are submitted at once."""

    name: str
    num_requests: int
    is_open: bool

    def jobs(self, vocab_size: int, seed: int) -> list[Job]:
        """The same for the same seed."""
        rng = random.Random(seed)
        prompts, answers = CROWDS[self.name]
        jobs = []
        for handle in range(self.num_requests):
            prompt_ids = tuple(rng.randrange(2, vocab_size) for _ in range(prompts.draw(rng)))
            num_output = answers.draw(rng)
            sampling = SamplingParams(max_tokens=LIMIT if self.is_open else num_output)
            jobs.append(Job(Request(handle=handle, prompt_ids=prompt_ids, sampling=sampling), num_output))
        return jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A cache of `share` of the peak demand, or one that fits."""

    kv_admission: KVAdmission = "forecast"
    share: float | None = None
    has_host: bool = False

    @property
    def name(self) -> str:
        size = "fits" if self.share is None else f"{self.share:.0%}"
        return f"{size}, {self.kv_admission}" + (", host" if self.has_host else "")


def sides(share: float) -> list[Side]:
    """The cache that fits comes first."""
    return [
        Side(),
        Side(share=share),
        Side(share=share, has_host=True),
        Side(share=share, kv_admission="optimistic"),
        Side(share=share, kv_admission="optimistic", has_host=True),
        Side(share=share, kv_admission="reserve"),
    ]


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """One side of one turn."""

    run: Run
    num_blocks: int
    num_host_blocks: int


Turn = dict[Side, Outcome]
Start = Callable[[int, int, KVAdmission], Drive]
"""(blocks, host blocks, admission) → a drive with an empty cache of that size."""


def virtual(num_rows: int, costs: Costs, token_tile: int = 1) -> Start:
    """Engines in virtual time."""

    def start(num_blocks: int, num_host_blocks: int, kv_admission: KVAdmission) -> Drive:
        config = SchedulerConfig(
            max_num_seqs=num_rows, max_model_len=MAX_MODEL_LEN, kv_admission=kv_admission, token_tile=token_tile
        )
        kv = KVConfig(
            block_size=BLOCK_SIZE, num_blocks=num_blocks, num_host_blocks=num_host_blocks, host_copy_s=costs.copy_s
        )
        limits = RunnerLimits(
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_num_seqs=num_rows,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
            token_tile=token_tile,
            num_host_blocks=num_host_blocks,
            host_copy_s=costs.copy_s,
        )
        clock = ManualClock()
        scheduler = Scheduler(config, kv, vocab_size=VOCAB_SIZE)
        return Drive(scheduler, VirtualRunner(limits, costs.steps, clock), clock=clock)

    return start


def real(engine: LoadedEngine, times: StepTime, clock: Callable[[], float] = time.perf_counter) -> Start:
    """Schedulers for a part of the blocks of one engine; `times` learns what its steps take."""
    limits = engine.runner.limits

    def start(num_blocks: int, num_host_blocks: int, kv_admission: KVAdmission) -> Drive:
        assert num_blocks <= limits.num_blocks and num_host_blocks <= limits.num_host_blocks
        config = SchedulerConfig(
            max_num_seqs=limits.max_num_seqs,
            max_model_len=MAX_MODEL_LEN,
            kv_admission=kv_admission,
            token_tile=limits.token_tile,
        )
        kv = replace(
            engine.capacity.kv,
            num_blocks=num_blocks,
            num_host_blocks=num_host_blocks,
            host_copy_s=limits.host_copy_s,
        )
        return Drive(
            Scheduler(config, kv, vocab_size=limits.vocab_size),
            engine.runner,
            clock=clock,
            observe=lambda plan, seconds: times.note(load_of(plan, limits.token_tile), seconds),
        )

    return start


def fitting(num_rows: int) -> int:
    """Blocks that are enough whatever comes."""
    return num_rows * -(-2 * LONGEST // BLOCK_SIZE)


def blocks_of(side: Side, num_rows: int, peak: int) -> tuple[int, int]:
    """Blocks of its cache and of its host tier."""
    num_blocks = fitting(num_rows) if side.share is None else math.floor(side.share * peak)
    return num_blocks, peak if side.has_host else 0


def take_turn(start: Start, num_rows: int, jobs: list[Job], wanted: Sequence[Side]) -> Turn:
    """These sides one after another; the first one has a cache that fits."""
    turn: Turn = {}
    peak = 0
    for side in wanted:
        sizes = blocks_of(side, num_rows, peak)
        run = start(*sizes, side.kv_admission).run(jobs)
        peak = peak or run.peak_blocks
        turn[side] = Outcome(run, *sizes)
    return turn


def take_turn_together(
    engines: Sequence[LoadedEngine], times: StepTime, num_rows: int, jobs: list[Job], wanted: Sequence[Side]
) -> Turn:
    """The same on an engine each, step by step in turns. Which blocks are held when, virtual time tells as well."""
    trial = virtual(num_rows, COSTS["bench-llama-60m"], engines[0].runner.limits.token_tile)
    peak = trial(fitting(num_rows), 0, "forecast").run(jobs).peak_blocks
    drives, sizes = [], []
    for side, engine in zip(wanted, engines, strict=True):
        watch = Stopwatch()
        sizes.append(blocks_of(side, num_rows, peak))
        drives.append((real(engine, times, watch)(*sizes[-1], side.kv_admission), watch))
    runs = alternate(drives, jobs)
    assert runs[0].peak_blocks == peak
    return {side: Outcome(run, *size) for side, run, size in zip(wanted, runs, sizes, strict=True)}


def records(turns: list[Turn]) -> Iterator[figures.Record]:
    """Medians over the turns, side by side."""
    fits = next(iter(turns[0]))
    for side in turns[0]:
        outcomes = [turn[side] for turn in turns]
        runs = [outcome.run for outcome in outcomes]
        ratios = [turn[side].run.tok_s / turn[fits].run.tok_s for turn in turns]
        full_ratios = [turn[side].run.full_tok_s / turn[fits].run.full_tok_s for turn in turns]

        def counted(*names: str, runs: list[Run] = runs) -> float:
            return statistics.median(sum(map(run.counted, names)) for run in runs)

        yield {
            "side": side.name,
            "kv_admission": side.kv_admission,
            "of_fit": round(statistics.median(ratios), 3),
            "full_of_fit": round(statistics.median(full_ratios), 3),
            "runs_of_fit": [round(ratio, 3) for ratio in ratios],
            "tok_s": round(statistics.median(run.tok_s for run in runs), 1),
            "generated_tokens": counted("generated_tokens"),
            "preemptions": counted("preemptions"),
            "recomputed_tokens": counted("recomputed_tokens"),
            "swaps": counted("swaps_out"),
            "copied_blocks": counted("blocks_copied_out", "blocks_copied_in"),
            "mean_rows": round(statistics.median(run.num_rows / run.num_steps for run in runs), 1),
            "num_blocks": statistics.median(outcome.num_blocks for outcome in outcomes),
            "num_host_blocks": statistics.median(outcome.num_host_blocks for outcome in outcomes),
        }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, help="built repository, or its engine directory; none: virtual time")
    parser.add_argument("--costs", choices=list(COSTS), nargs="+", default=list(COSTS), help="of steps in virtual time")
    parser.add_argument("--crowd", choices=list(CROWDS), nargs="+", default=list(CROWDS))
    parser.add_argument("--answers", choices=("known", "open"), nargs="+", default=["known", "open"])
    parser.add_argument("--rows", type=int, default=16, help="sequences that run at once, if blocks last")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--share", type=float, default=0.6, help="of the peak demand")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="compute threads; 0: all cores")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    return parser.parse_args()


def open_engine(folder: Path, num_rows: int, num_threads: int) -> LoadedEngine:
    """With blocks for whatever comes, and as many on the host."""
    engine_dir = folder / "engine" / "1" / "artifacts"
    engine_dir = engine_dir if engine_dir.is_dir() else folder
    scheduler = SchedulerConfig(max_num_seqs=num_rows, max_model_len=MAX_MODEL_LEN)
    config = EngineConfig(kv=KVConfig(num_blocks=fitting(num_rows)), scheduler=scheduler, num_threads=num_threads)
    engine = load_engine(engine_dir, config)
    host_bytes = engine.capacity.num_bytes
    engine.runner.close()
    return load_engine(engine_dir, replace(config, kv=replace(config.kv, host_memory_bytes=host_bytes)))


def measure(
    turn: Callable[[list[Job]], Turn], vocab_size: int, about: figures.Record, options: argparse.Namespace
) -> None:
    """Every crowd, known and open, on one kind of engine."""
    for name in options.crowd:
        for answers in options.answers:
            crowd = Crowd(name=name, num_requests=options.requests, is_open=answers == "open")
            seeds = [options.seed + 1000 * number for number in range(options.repeat)]
            turns = [turn(crowd.jobs(vocab_size, seed)) for seed in seeds]
            asked = {"crowd": name, "answers": answers, "rows": options.rows, "requests": options.requests}
            for record in records(turns):
                line = {"benchmark": "cache_pressure", **about, **asked, **record, **figures.machine()}
                print(json.dumps(line), flush=True)
                if options.out is not None:
                    figures.append(options.out, line)


def main() -> None:
    options = arguments()
    wanted = sides(options.share)
    if options.engine is None:
        for name in options.costs:
            one_by_one = partial(take_turn, virtual(options.rows, COSTS[name]), options.rows, wanted=wanted)
            about = {"form": "virtual", "model": name}
            measure(one_by_one, VOCAB_SIZE, about, options)
        return
    engines = [open_engine(options.engine, options.rows, options.threads) for _ in wanted]
    times, manifest = StepTime(), engines[0].manifest
    warm_up = Crowd(name="varied", num_requests=options.rows, is_open=False).jobs(manifest.vocab_size, options.seed - 1)
    take_turn_together(engines, StepTime(), options.rows, warm_up, wanted)
    about = {"form": "real", "model": manifest.name, "dtype": manifest.dtype}
    together = partial(take_turn_together, engines, times, options.rows, wanted=wanted)
    measure(together, manifest.vocab_size, about, options)
    print(f"{times.costs()}, {engines[0].runner.limits.host_copy_s * 1e6:.1f} us to copy a block")
    for engine in engines:
        engine.runner.close()


if __name__ == "__main__":
    main()
