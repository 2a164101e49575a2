"""Checks and measures on a GPU, part by part; each ends within minutes.

    python -m perf.gpu_check kernels [--out FOLDER]

A part that finds a wrong result records it, goes on, and fails at its end. `--device cpu` runs the same code in
Triton's interpreter on a tiny model: that shows that the checks work, and its times mean nothing. Writes
gpu_PART_DATE.json and prints a table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported

import torch

from perf.gpu_check import engine_checks, parallel_checks, tensorrt_checks, tensorrt_segments
from perf.gpu_check.card import Card, Record
from perf.gpu_check.engine_checks import Load
from perf.gpu_check.kernel_checks import Checks
from perf.gpu_check.models import SHAPES
from perf.gpu_check.tensorrt_flavors import in_folder
from perf.gpu_check.tuning_checks import tune

BATCHES = (1, 8, 32, 128, 256)
LOADS = (
    Load(num_prompt=128, num_output=128, num_requests=2048),
    Load(num_prompt=1000, num_output=1000, num_requests=768),
    Load(num_prompt=2048, num_output=2048, num_requests=256),
    Load(num_prompt=5000, num_output=500, num_requests=192),
)
TINY_LOADS = (Load(num_prompt=9, num_output=3, num_requests=3),)


class Parts:
    """What can be asked for; every public method is a part."""

    def __init__(self, card: Card, shape: str, out: Path | None) -> None:
        self._out = out
        self._card, self._config, self._is_tiny = card, SHAPES[shape], shape == "tiny"

    def kernels(self) -> Iterable[Record]:
        return Checks(self._card, is_tiny=self._is_tiny).run()

    def graphs(self) -> Iterable[Record]:
        return engine_checks.graphs(self._card, SHAPES["tiny"])

    def steps_bf16(self) -> Iterable[Record]:
        return engine_checks.steps(self._card, self._config, "bf16", (1, 2) if self._is_tiny else BATCHES)

    def steps_fp8(self) -> Iterable[Record]:
        return engine_checks.steps(self._card, self._config, "fp8", (1, 2) if self._is_tiny else BATCHES)

    def throughput_fp8(self) -> Iterable[Record]:
        return self._throughput("fp8")

    def throughput_bf16(self) -> Iterable[Record]:
        return self._throughput("bf16")

    def tune(self) -> Iterable[Record]:
        return tune(self._card, self._config, self._out)

    def parallel(self) -> Iterable[Record]:
        with tempfile.TemporaryDirectory() as name:
            yield from parallel_checks.parallel(self._card, Path(name))

    def tensorrt(self) -> Iterable[Record]:
        return in_folder(tensorrt_checks.answers, self._card)

    def tensorrt_segments(self) -> Iterable[Record]:
        return in_folder(tensorrt_segments.segments, self._card, "input")

    def tensorrt_constants(self) -> Iterable[Record]:
        return in_folder(tensorrt_segments.segments, self._card, "constant")

    def tensorrt_graphs(self) -> Iterable[Record]:
        return in_folder(tensorrt_checks.graphs, self._card)

    def tensorrt_layer(self) -> Iterable[Record]:
        return in_folder(tensorrt_segments.layers, self._card, "input")

    def tensorrt_layer_constants(self) -> Iterable[Record]:
        return in_folder(tensorrt_segments.layers, self._card, "constant")

    def _throughput(self, dtype: str) -> Iterable[Record]:
        loads, rows, tokens = (TINY_LOADS, 4, 16) if self._is_tiny else (LOADS, 512, 4096)
        return engine_checks.throughput(
            self._card, self._config, dtype, loads, max_num_seqs=rows, max_num_tokens=tokens
        )


NAMES = tuple(name for name in vars(Parts) if not name.startswith("_"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=NAMES)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="folder for the JSON file; on a GPU perf/results, else none")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU here (torch.cuda.is_available() is False); --device cpu tries the checks themselves")
    card = Card(torch.device(options.device))
    folder = options.out or (Path("perf/results") if card.is_gpu else None)
    parts = Parts(card, "llama-3.1-8b" if card.is_gpu else "tiny", folder)
    part: Callable[[], Iterable[Record]] = getattr(parts, options.part)
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    facts: Record = {"part": options.part, "date": date, **card.facts()}
    print(json.dumps(facts, default=str))
    path = None if folder is None else folder / f"gpu_{options.part}_{date}.json"
    records, begin_s = [], time.perf_counter()
    for record in recorded(options.part, part):
        print("  " + "  ".join(f"{name}={value}" for name, value in record.items()), flush=True)
        records.append(record)
        if path is not None:  # after each: a part that runs out of time keeps what it has
            _write(path, {**facts, "seconds": round(time.perf_counter() - begin_s, 1), "records": records})
    if all("skipped" in record for record in records):
        print(f"{options.part}: nothing was checked", flush=True)
    if failed := [str(record.get("name")) for record in records if "failed" in record]:
        sys.exit(f"{options.part}: {len(failed)} of {len(records)} failed: {', '.join(failed)}")


def recorded(name: str, part: Callable[[], Iterable[Record]]) -> Iterator[Record]:
    """The part's records as they come; where it raises, a last one that says what."""
    try:
        yield from part()
    except Exception as error:
        traceback.print_exc()
        yield {"name": name, "failed": f"{type(error).__name__}: {error}"}


def _write(path: Path, content: Record) -> None:
    """All of it or nothing: whoever reads it meanwhile finds what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
