"""Processor time of the processes of a running server, by what they are."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_STUB, _CORE, _SERVER = "triton_python_backend_stub", "pageflight.loop.core_process", "tritonserver"


def cpu_seconds(root_pid: int) -> dict[str, float]:
    """User and system time of `root_pid` and all its descendants so far.

    Summed by role: `core`, `stub NAME` for the processes of the Triton model NAME, `tritonserver`, and `other`.
    """
    seconds: dict[str, float] = defaultdict(float)
    for pid in _family(root_pid):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        seconds[_role(words)] += (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return dict(seconds)


def _family(root_pid: int) -> list[int]:
    found, waiting = [], [root_pid]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                waiting += map(int, children.read_text(encoding="ascii").split())
            except OSError:  # the thread has ended
                continue
    return found


def _role(words: list[str]) -> str:
    if _CORE in words:
        return "core"
    if words[0].endswith(_STUB):
        model = next((Path(word).parent.parent.name for word in words[1:] if word.endswith("/model.py")), "?")
        return f"stub {model}"
    return "tritonserver" if words[0].endswith(_SERVER) else "other"
