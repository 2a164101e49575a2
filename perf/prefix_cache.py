"""What the prefix cache saves: prompts that begin alike and come at once, come again, and come back from host memory.

    python -m perf.prefix_cache --engine REPOSITORY [--plan shared:32:32:512+32:32]

Waves of the plan's requests, all submitted at once: `cold`, whose common prefix nobody has computed; `warm`, with the
same prefix and other tokens behind it; then requests of other prefixes fill the cache until the first one is pushed
out of it; then `back`, with the first prefix again. Sides, in turns: no prefix cache; a prefix cache; a prefix cache
with host memory for all that is pushed out. Medians over `--repeat` turns, each with other tokens; times only compare
within a turn.

`hit_rate`: prompt tokens found ÷ prompt tokens. Its ceiling is printed beside it: every request but a cold wave's
first finds all whole blocks of the prefix. `computed`: prompt tokens that were not found. `prompts_s`: until the last
first token; `wall_s`: until the last token; `saved`: the share of each that the side without a cache needed and this
one did not. Prints one JSON line per side and wave.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `perf` is not installed, and this may run as a script

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig
from pageflight.core.request import Request, SamplingParams
from pageflight.runners.factory import LoadedEngine, load_engine
from pageflight.sched.scheduler import Scheduler
from perf import figures
from perf.drive import Drive, Job, Run
from perf.workload import Workload

WAVES = ("cold", "warm", "back")
SIDES = ("off", "on", "host")


@dataclass(frozen=True, slots=True)
class Wave:
    """What one wave measured, and how many blocks of it the host brought back."""

    run: Run
    num_prompt_tokens: int
    prompts_s: float

    @property
    def hit_rate(self) -> float:
        return self.run.counted("cached_tokens") / self.num_prompt_tokens


def jobs(prompts: list[list[int]], num_output: int, first_handle: int) -> list[Job]:
    sampling = SamplingParams(max_tokens=num_output)
    return [
        Job(Request(handle=first_handle + index, prompt_ids=tuple(prompt), sampling=sampling), num_output)
        for index, prompt in enumerate(prompts)
    ]


def side_of(engine: LoadedEngine, side: str, num_blocks: int, num_host_blocks: int, config: SchedulerConfig) -> Drive:
    """An empty cache."""
    kv = replace(
        engine.capacity.kv,
        num_blocks=num_blocks,
        num_host_blocks=num_host_blocks if side == "host" else 0,
        host_copy_s=engine.runner.limits.host_copy_s,
        prefix_cache=side != "off",
    )
    return Drive(Scheduler(config, kv, vocab_size=engine.runner.limits.vocab_size), engine.runner)


def measure(
    drive: Drive, workload: Workload, *, num_blocks: int, block_size: int, vocab_size: int, seed: int
) -> list[Wave]:
    """All waves on one side."""
    prompts = workload.prompts(vocab_size, seed)
    again = workload.prompts(vocab_size, seed + 1)
    third = workload.prompts(vocab_size, seed + 2)
    head = prompts[0][: workload.num_shared]
    waves = []
    for number, own in enumerate((prompts, again, third)):
        if WAVES[number] == "back":
            fill(drive, workload, num_blocks=num_blocks, block_size=block_size, vocab_size=vocab_size, seed=seed)
        asked = [head + prompt[workload.num_shared :] for prompt in own]
        run = drive.run(jobs(asked, workload.num_output, number * len(asked)))
        waves.append(Wave(run, sum(map(len, asked)), max(run.first_token_s.values())))
    return waves


def fill(drive: Drive, workload: Workload, *, num_blocks: int, block_size: int, vocab_size: int, seed: int) -> None:
    """Other prompts, until every block of the cache has been one of theirs."""
    num_requests = -(-num_blocks // (workload.num_prompt // block_size)) + 1
    other = replace(workload, num_requests=num_requests, num_shared=0, num_own=workload.num_prompt)
    drive.run(jobs(other.prompts(vocab_size, seed + 3), 1, len(WAVES) * workload.num_requests))


def records(turns: list[dict[str, list[Wave]]], workload: Workload, block_size: int) -> list[figures.Record]:
    """Medians over the turns, by wave and side."""
    found = []
    whole = workload.num_shared // block_size * block_size * workload.num_requests
    for number, name in enumerate(WAVES):
        for side in SIDES:
            waves = [turn[side][number] for turn in turns]
            off = [turn["off"][number] for turn in turns]
            num_cold = workload.num_shared // block_size * block_size if name == "cold" else 0
            ceiling = (whole - num_cold) / waves[0].num_prompt_tokens
            pairs = list(zip(waves, off, strict=True))
            found.append(
                {
                    "wave": name,
                    "side": side,
                    "hit_rate": round(statistics.median(wave.hit_rate for wave in waves), 4),
                    "hit_rate_ceiling": round(ceiling, 4) if side != "off" else 0.0,
                    "from_host": statistics.median(wave.run.counted("host_cached_tokens") for wave in waves),
                    "blocks_copied_in": statistics.median(wave.run.counted("blocks_copied_in") for wave in waves),
                    "computed": statistics.median(
                        wave.num_prompt_tokens - wave.run.counted("cached_tokens") for wave in waves
                    ),
                    "prompts_s": round(statistics.median(wave.prompts_s for wave in waves), 3),
                    "wall_s": round(statistics.median(wave.run.wall_s for wave in waves), 3),
                    "prompts_saved": round(statistics.median(1 - on.prompts_s / no.prompts_s for on, no in pairs), 3),
                    "wall_saved": round(statistics.median(1 - on.run.wall_s / no.run.wall_s for on, no in pairs), 3),
                }
            )
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True, help="built repository, or its engine directory")
    parser.add_argument("--plan", default="shared:32:32:512+32:32", help="kind:concurrency:requests:prompt:output")
    parser.add_argument("--cache-tokens", type=int, default=0, help="0: of all requests, had they nothing in common")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="compute threads; 0: all cores")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    workload = Workload.parse(options.plan)
    if workload.concurrency < workload.num_requests:
        raise SystemExit(f"--plan {options.plan}: all requests of a wave come at once, so concurrency = requests")
    max_len = workload.num_prompt + workload.num_output
    engine_dir = options.engine / "engine" / "1" / "artifacts"
    engine_dir = engine_dir if engine_dir.is_dir() else options.engine
    block_size = KVConfig().block_size
    cache_tokens = options.cache_tokens or workload.num_requests * -(-max_len // block_size) * block_size
    num_blocks = cache_tokens // block_size
    config = SchedulerConfig(max_num_seqs=workload.concurrency, max_model_len=max_len)
    wanted = EngineConfig(kv=KVConfig(num_blocks=num_blocks), scheduler=config, num_threads=options.threads)
    engine = load_engine(engine_dir, wanted)
    host_bytes = 4 * engine.capacity.num_bytes
    engine.runner.close()
    engine = load_engine(engine_dir, replace(wanted, kv=replace(wanted.kv, host_memory_bytes=host_bytes)))
    limits = engine.runner.limits
    config = replace(config, token_tile=limits.token_tile)

    def once(seed: int) -> dict[str, list[Wave]]:
        return {
            side: measure(
                side_of(engine, side, limits.num_blocks, limits.num_host_blocks, config),
                workload,
                num_blocks=limits.num_blocks,
                block_size=block_size,
                vocab_size=limits.vocab_size,
                seed=seed,
            )
            for side in SIDES
        }

    once(options.seed)  # warms up
    turns = [once(options.seed + 10 * (number + 1)) for number in range(options.repeat)]
    for record in records(turns, workload, block_size):
        line = {
            "benchmark": "prefix_cache",
            "model": engine.manifest.name,
            "dtype": engine.manifest.dtype,
            "plan": options.plan,
            "num_blocks": limits.num_blocks,
            "num_host_blocks": limits.num_host_blocks,
            **record,
            **figures.machine(),
        }
        print(json.dumps(line), flush=True)
        if options.out is not None:
            figures.append(options.out, line)
    engine.runner.close()


if __name__ == "__main__":
    main()
