"""How often an answer goes on otherwise after its engine core died, and how near the tie was that fell the other way.

    python -m perf.survival --engine REPOSITORY... [--text HELD_OUT.jsonl] [--deterministic]

Greedy answers are computed undisturbed, `--rows` at a time. Each is then cut at a random place and handed to a new
scheduler with an empty cache as a supervisor hands it to a new core: the prompt, and what was delivered as
`output_ids`. Once every sequence is `alone`, once all come at once as `company`. A third side, `undisturbed`, is what
company does without any death: the whole answer computed alone. The floor of every share is 0, and so is its ceiling
with `--deterministic`, which measures every side without and with that setting, and ends with status 1 if any answer
then differs, or any log probability in its last bit.

`position`: tokens after the cut (undisturbed: after the prompt) until the first that differs. `gap`: what the log
probabilities of the two tokens differ by there, both from one context that is computed as a prompt. Prompts are
random ids, or pieces of the texts in `--text` (lines of JSON with `text`). Prints one JSON line per side. Not a
matter of time: runs on a busy machine as well.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `perf` is not installed, and this may run as a script

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig
from pageflight.core.request import Request, SamplingParams
from pageflight.runners.factory import LoadedEngine, load_engine
from pageflight.sched.scheduler import Scheduler
from pageflight.text.tokenizer import Tokenizer
from perf import figures
from perf.drive import Drive, Job, Run

SHORTEST, LONGEST = 16, 128  # tokens of prompts
FORCE = 1e4  # added to a logit, it decides


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first token that is another one."""

    handle: int
    position: int  # after the cut
    context: Request  # prompt and answer up to there
    before: int
    after: int


class Engine:
    """An engine whose every run begins with an empty cache."""

    def __init__(self, engine_dir: Path, *, num_rows: int, max_len: int, deterministic: bool, num_threads: int) -> None:
        self._config = SchedulerConfig(max_num_seqs=num_rows, max_model_len=max_len, deterministic=deterministic)
        num_blocks = num_rows * -(-max_len // KVConfig().block_size)
        config = EngineConfig(kv=KVConfig(num_blocks=num_blocks), scheduler=self._config, num_threads=num_threads)
        self.loaded: LoadedEngine = load_engine(engine_dir, config)

    def run(self, jobs: Sequence[Job], *, num_rows: int = 0) -> Run:
        """All jobs, at most `num_rows` at once (0: as many as there are rows)."""
        limits = self.loaded.runner.limits
        config = replace(
            self._config,
            max_num_seqs=num_rows or self._config.max_num_seqs,
            token_tile=limits.token_tile,
            replay_rows=limits.replay_rows,
        )
        scheduler = Scheduler(config, self.loaded.capacity.kv, vocab_size=limits.vocab_size)
        return Drive(scheduler, self.loaded.runner).run(jobs)


def requests(prompts: Sequence[Sequence[int]], num_output: int) -> list[Request]:
    sampling = SamplingParams(max_tokens=num_output, log_probs=True)
    return [
        Request(handle=handle, prompt_ids=tuple(prompt), sampling=sampling) for handle, prompt in enumerate(prompts)
    ]


def random_prompts(vocab_size: int, count: int, rng: random.Random) -> list[list[int]]:
    return [[rng.randrange(2, vocab_size) for _ in range(rng.randint(SHORTEST, LONGEST))] for _ in range(count)]


def text_prompts(path: Path, tokenizer: Tokenizer, count: int, rng: random.Random) -> list[list[int]]:
    """Pieces of the file's texts, from anywhere in them."""
    lines = path.read_text(encoding="utf-8").splitlines()
    ids = [tokenizer.encode(json.loads(line)["text"]) for line in lines]
    texts = [text for text in ids if len(text) > SHORTEST]
    prompts = []
    for text in rng.choices(texts, [len(text) for text in texts], k=count):
        begin = rng.randrange(len(text) - SHORTEST)
        prompts.append(text[begin : begin + rng.randint(SHORTEST, LONGEST)])
    return prompts


def job(request: Request) -> Job:
    return Job(request, request.sampling.max_tokens - len(request.output_ids))


def cut(request: Request, output_ids: Sequence[int], length: int) -> Request:
    """What a new core is told of a sequence that had delivered so many tokens."""
    return replace(request, output_ids=tuple(output_ids[:length]), is_taken_over=True)


def differences(asked: Sequence[Request], run: Run, whole: Run) -> list[Difference]:
    """The first of each answer of `run`, which continues what `asked` had delivered of `whole`."""
    found = []
    for request in asked:
        num_kept = len(request.output_ids)
        before, after = whole.ids[request.handle], run.ids[request.handle]
        assert len(after) == len(before) - num_kept
        for position, (old, new) in enumerate(zip(before[num_kept:], after, strict=True)):
            if old != new:
                context = cut(request, before, num_kept + position)
                found.append(
                    Difference(handle=request.handle, position=position, context=context, before=old, after=new)
                )
                break
    return found


def gaps(engine: Engine, found: Sequence[Difference]) -> list[float]:
    """What the log probabilities of both tokens differ by, each forced in the same context."""
    forced = []
    for token in ("before", "after"):
        jobs = []
        for difference in found:
            sampling = replace(
                difference.context.sampling,
                max_tokens=len(difference.context.output_ids) + 1,
                logit_bias=((getattr(difference, token), FORCE),),
            )
            jobs.append(job(replace(difference.context, sampling=sampling)))
        run = engine.run(jobs, num_rows=1)
        assert all(run.ids[difference.handle] == [getattr(difference, token)] for difference in found)
        forced.append([run.log_probs[difference.handle][0] for difference in found])
    return [abs(before - after) for before, after in zip(*forced, strict=True)]


def differing_bits(asked: Sequence[Request], run: Run, whole: Run) -> int:
    """Sequences of which any log probability is another one in its last bit."""
    return sum(run.log_probs[one.handle] != whole.log_probs[one.handle][len(one.output_ids) :] for one in asked)


def measure(engine: Engine, whole_requests: Sequence[Request], rng: random.Random) -> list[figures.Record]:
    """A record for every side."""
    whole = engine.run([job(request) for request in whole_requests])
    replays = [
        cut(request, whole.ids[request.handle], rng.randrange(1, request.sampling.max_tokens))
        for request in whole_requests
    ]
    records = []
    for side, asked, num_rows in (
        ("undisturbed", whole_requests, 1),
        ("alone", replays, 1),
        ("company", replays, 0),
    ):
        run = engine.run([job(request) for request in asked], num_rows=num_rows)
        found = differences(asked, run, whole)
        at = sorted(gaps(engine, found))
        records.append(
            {
                "side": side,
                "sequences": len(asked),
                "tokens": sum(map(len, run.ids.values())),
                "differ": len(found),
                "share": round(len(found) / len(asked), 4),
                "bits_differ": differing_bits(asked, run, whole),
                "mean_position": round(statistics.fmean(each.position for each in found), 1) if found else None,
                "median_gap": round(statistics.median(at), 6) if at else None,
                "p90_gap": round(figures.percentile(at, 0.9), 6) if at else None,
                "max_gap": round(at[-1], 6) if at else None,
            }
        )
    return records


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, nargs="+", required=True, help="built repositories, or engine folders")
    parser.add_argument("--text", type=Path, help="lines of JSON with a text each, to cut prompts from")
    parser.add_argument("--sequences", type=int, default=200)
    parser.add_argument("--output", type=int, default=96, help="tokens of each answer")
    parser.add_argument("--rows", type=int, default=32, help="sequences that run at once")
    parser.add_argument("--deterministic", action="store_true", help="measure every side without and with it")
    parser.add_argument("--threads", type=int, default=0, help="compute threads; 0: all cores")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    has_failed = False
    for folder in options.engine:
        engine_dir = folder / "engine" / "1" / "artifacts"
        engine_dir = engine_dir if engine_dir.is_dir() else folder
        for deterministic in (False, True) if options.deterministic else (False,):
            engine = Engine(
                engine_dir,
                num_rows=options.rows,
                max_len=LONGEST + options.output,
                deterministic=deterministic,
                num_threads=options.threads,
            )
            manifest, rng = engine.loaded.manifest, random.Random(options.seed)
            if options.text is None:
                prompts = random_prompts(manifest.vocab_size, options.sequences, rng)
            else:
                tokenizer = Tokenizer.load(engine_dir / "tokenizer")
                prompts = text_prompts(options.text, tokenizer, options.sequences, rng)
            for record in measure(engine, requests(prompts, options.output), rng):
                has_failed |= deterministic and bool(record["differ"] or record["bits_differ"])
                line = {
                    "benchmark": "survival",
                    "model": manifest.name,
                    "dtype": manifest.dtype,
                    "kv_dtype": manifest.kv_dtype,
                    "deterministic": deterministic,
                    "prompts": "random" if options.text is None else "text",
                    "rows": options.rows,
                    **record,
                    **figures.machine(),
                }
                print(json.dumps(line), flush=True)
                if options.out is not None:
                    figures.append(options.out, line)
            engine.loaded.runner.close()
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
