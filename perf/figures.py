"""What was measured: one record for each workload, appended to a file as one line of JSON.

Standard library only, so that drivers of other engines can use it inside their own environments.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perf.workload import Workload

Record = dict[str, Any]


@dataclass(slots=True)
class Answer:
    """What came back for one request; times in seconds of one monotonic clock."""

    sent_s: float
    arrivals_s: list[float] = field(default_factory=list)  # of responses that carried tokens
    num_input: int = 0
    num_output: int = 0

    @property
    def first_token_s(self) -> float:
        return self.arrivals_s[0] - self.sent_s

    @property
    def end_to_end_s(self) -> float:
        return self.arrivals_s[-1] - self.sent_s

    @property
    def per_token_s(self) -> float:
        """Mean time between output tokens after the first."""
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / max(1, self.num_output - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Times between responses."""
        return [b - a for a, b in zip(self.arrivals_s, self.arrivals_s[1:])]  # noqa: B905 (lengths differ by one)


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank; `share` from 0 to 1. NaN for no values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))] if ordered else float("nan")


def summarise(workload: Workload, answers: Sequence[Answer], *, wall_s: float, cpu_s: float, seed: int) -> Record:
    """Figures of one run. `out_ok`: every answer has exactly as many tokens as asked for; `in_ok`: every prompt too."""

    def milliseconds(values: Sequence[float], share: float) -> float:
        return round(percentile(values, share) * 1e3, 2)

    first = [answer.first_token_s for answer in answers]
    gaps = [gap for answer in answers for gap in answer.gaps_s]
    lengths = sorted({answer.num_input for answer in answers})
    return {
        "kind": workload.kind.value,
        "conc": workload.concurrency,
        "nreq": workload.num_requests,
        "prompt": workload.prompt,
        "output": workload.num_output,
        "tok_s": round(sum(answer.num_output for answer in answers) / wall_s, 1),
        "wall_s": round(wall_s, 2),
        "ttft_p50_ms": milliseconds(first, 0.5),
        "ttft_p99_ms": milliseconds(first, 0.99),
        "tpot_p50_ms": milliseconds([answer.per_token_s for answer in answers], 0.5),
        "itl_p99_ms": milliseconds(gaps, 0.99),
        "e2e_p50_ms": milliseconds([answer.end_to_end_s for answer in answers], 0.5),
        "maxgap_ms": milliseconds(gaps, 1.0),
        "responses": sum(len(answer.arrivals_s) for answer in answers),
        "out_ok": len(answers) == workload.num_requests
        and all(answer.num_output == workload.num_output for answer in answers),
        "in_ok": all(answer.num_input == workload.num_prompt for answer in answers),
        "prompt_seen": [lengths[0], lengths[-1]] if lengths else [],
        "client_cpu_s": round(cpu_s, 2),
        "seed": seed,
    }


def machine() -> Record:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass  # not Linux: the platform's word for it has to do
    return {"cpu": name, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}


def append(path: Path, record: Mapping[str, Any]) -> None:
    """One line of JSON at the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read(paths: Sequence[Path]) -> list[Record]:
    """All records of some files, in order. Raises ValueError naming file and line of one that is not JSON."""
    records = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
            records.append(record)
    return records
