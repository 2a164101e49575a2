"""A FakeRunner that dies, raises, hangs or runs out of memory on demand: for showing what becomes of the others."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pageflight.core.errors import OutOfMemory
from pageflight.core.plan import StepPlan, StepResult

if TYPE_CHECKING:
    from pageflight.runners.fake import FakeRunner


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens in every step that computes a token with this id."""

    token_id: int
    kind: Literal["exit", "abort", "kill", "raise", "hang", "memory"]
    when: Literal["submit", "collect"] = "submit"
    """Before the news of the step before have gone out, or after."""
    above_blocks: int = 0
    """Only where the cache has more blocks, which take the memory."""


class FaultyRunner:
    """Runs plans as its FakeRunner does, until one meets a fault."""

    def __init__(self, runner: FakeRunner, faults: Sequence[Fault]) -> None:
        self.limits = runner.limits
        self._runner = runner
        num_blocks = runner.limits.num_blocks
        self._faults = {fault.token_id: fault for fault in faults if num_blocks > fault.above_blocks}
        self._due: Fault | None = None

    def submit(self, plan: StepPlan) -> None:
        self._runner.submit(plan)
        found = [index for index in self._runner.step_tokens(plan) if index in self._faults]
        self._due = self._faults[found[0]] if found else None
        self._meet("submit")

    def collect(self) -> StepResult:
        self._meet("collect")
        return self._runner.collect()

    def close(self) -> None:
        self._runner.close()

    def _meet(self, when: str) -> None:
        if self._due is None or self._due.when != when:
            return
        if self._due.kind == "exit":
            os._exit(3)
        if self._due.kind == "abort":
            os.abort()
        if self._due.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._due.kind == "raise":
            raise RuntimeError(f"the engine does not like token {self._due.token_id}")
        if self._due.kind == "memory":
            raise OutOfMemory(f"no memory for token {self._due.token_id}")
        while True:
            time.sleep(3600)
