"""The scheduler's machine, whose run is recorded and replayed at its end."""

from __future__ import annotations

from counted import Counted
from memory_recorder import MemoryRecorder
from sched_harness import VOCAB_SIZE
from scheduler_machine import SchedulerMachine

from pageflight.core.config import EngineConfig
from pageflight.loop.recording import Header
from pageflight.loop.replay import replay


class RecordedSchedulerMachine(Counted, SchedulerMachine):
    """Whatever is decided in a run is decided again when the same calls come at the same times."""

    def __init__(self) -> None:
        super().__init__()
        self.recorder = MemoryRecorder()

    def teardown(self) -> None:
        super().teardown()
        if self.harness is None:
            return
        header = Header(config=EngineConfig(scheduler=self.harness.config, kv=self.harness.kv), vocab_size=VOCAB_SIZE)
        difference = replay(header, self.recorder.entries()).difference
        assert difference is None, str(difference)
