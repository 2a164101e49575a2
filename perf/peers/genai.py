"""OpenVINO GenAI's continuous batching in process, driven line by line over standard input.

    PYTHONPATH=REPOSITORY GENAI_VENV/bin/python -m perf.peers.genai --ir FOLDER --precision bf16

Says {"ready": …}, then for every line `WORKLOAD SEED` that it reads, answers with the figures of that workload as one
line of JSON. Runs inside the environment of openvino-genai: only that, numpy and the standard library are imported.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from perf import figures
from perf.workload import Workload


class Pipeline:
    """A ContinuousBatchingPipeline and the next free request number."""

    def __init__(self, ir: Path, *, precision: str, threads: int, cache_gib: int, prefix_cache: bool) -> None:
        import openvino_genai as genai  # type: ignore[import-not-found]

        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = cache_gib
        scheduler.max_num_batched_tokens = 2048
        scheduler.max_num_seqs = 256
        scheduler.enable_prefix_caching = prefix_cache
        scheduler.dynamic_split_fuse = True
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._genai: Any = genai
        self._pipeline: Any = genai.ContinuousBatchingPipeline(str(ir), scheduler, "CPU", settings)
        self._next_number = 0

    def run(self, workload: Workload, *, vocab_size: int, seed: int) -> figures.Record:
        """Closed loop: a finished request makes room for the next before the following step."""
        prompts = workload.prompts(vocab_size, seed)
        wishes = self._genai.GenerationConfig()
        wishes.max_new_tokens = wishes.min_new_tokens = workload.num_output
        wishes.ignore_eos, wishes.do_sample = True, False
        waiting = iter(prompts)
        answers: list[figures.Answer] = []
        open_answers: list[tuple[Any, figures.Answer]] = []
        cpu_s, started_s = time.process_time(), time.perf_counter()
        while True:
            while len(open_answers) < workload.concurrency and (prompt := next(waiting, None)) is not None:
                answer = figures.Answer(time.perf_counter(), num_input=len(prompt))
                open_answers.append((self._add(prompt, wishes), answer))
                answers.append(answer)
            if not open_answers:
                break
            self._pipeline.step()
            now_s = time.perf_counter()
            still_open = []
            for handle, answer in open_answers:
                if handle.can_read():
                    answer.num_output += sum(len(output.generated_ids) for output in handle.read().values())
                    answer.arrivals_s.append(now_s)
                if answer.num_output < workload.num_output:
                    still_open.append((handle, answer))
            open_answers = still_open
        wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
        return figures.summarise(workload, answers, wall_s=wall_s, cpu_s=cpu_s, seed=seed)

    def _add(self, prompt: list[int], wishes: Any) -> Any:
        import numpy as np
        import openvino as ov  # type: ignore[import-untyped]

        self._next_number += 1
        return self._pipeline.add_request(self._next_number, ov.Tensor(np.array([prompt], np.int64)), wishes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ir", type=Path, required=True, help="folder with openvino_model.xml and config.json")
    parser.add_argument("--precision", choices=("f32", "bf16"), default="bf16")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--cache-gib", type=int, default=2, help="memory of the K/V cache")
    parser.add_argument("--prefix-cache", action="store_true")
    options = parser.parse_args()
    vocab_size = json.loads((options.ir / "config.json").read_text())["vocab_size"]
    pipeline = Pipeline(
        options.ir,
        precision=options.precision,
        threads=options.threads,
        cache_gib=options.cache_gib,
        prefix_cache=options.prefix_cache,
    )
    print(json.dumps({"ready": str(options.ir)}), flush=True)
    for line in sys.stdin:
        item, seed = line.split()
        print(json.dumps(pipeline.run(Workload.parse(item), vocab_size=vocab_size, seed=int(seed))), flush=True)


if __name__ == "__main__":
    main()
