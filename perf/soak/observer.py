"""Looks at the server once a second: memory, processes that came and went, counters that only grow."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Mapping

from perf.processes import Life, shared_memory, tree
from perf.soak.memory import Memory
from perf.soak.server import Running

_LOOK_S = 1.0
_COUNTERS = re.compile(r"pageflight_(\w+)_total\b")


class Observer:
    """A thread of its own, from the first look to `stop`."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self.memory = Memory()
        self.lives: dict[Life, float] = {}  # all that ever were, and when they were last seen
        self.segments: set[str] = set()
        self.counted: Counter[str] = Counter()
        self.num_looks = 0
        self._last: dict[str, float] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def gone(self) -> list[Life]:
        """Processes that have ended."""
        return [life for life in self.lives if not life.is_running]

    def count(self, series: Mapping[str, float]) -> None:
        """Add up what counters have gained; one that is smaller than before began anew with its process."""
        for name, value in series.items():
            match = _COUNTERS.match(name)
            if match:
                before = self._last.get(name, 0.0)
                self.counted[match[1]] += round(value - before if value >= before else value)
                self._last[name] = value

    def _run(self) -> None:
        while not self._stopping.wait(_LOOK_S):
            samples = tree(self._running.process.pid)
            now_s = time.monotonic()
            self.memory.add(now_s, samples)
            self.lives |= {sample.life: now_s for sample in samples}
            self.count(self._running.series())
            for sample in samples:
                if sample.life.role == "tritonserver":
                    self.segments |= shared_memory(sample.life.pid)
            self.num_looks += 1
