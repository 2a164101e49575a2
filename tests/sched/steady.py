"""A scheduler on a runner that answers at once, for what takes thousands of steps to show."""

from __future__ import annotations

from collections import Counter

import numpy as np

from pageflight.core.config import KVConfig, SchedulerConfig
from pageflight.core.plan import StepEvents, StepPlan, StepResult
from pageflight.core.request import Request, SamplingParams
from pageflight.sched.scheduler import Scheduler


class Steady:
    """Counts what each tenant was served: prompt tokens when a prompt first starts, output tokens as they come."""

    def __init__(
        self, *, num_blocks: int = 512, block_size: int = 4, prefix_cache: bool = False, **settings: object
    ) -> None:
        self.config = SchedulerConfig(**{"max_model_len": 512, **settings})  # type: ignore[arg-type]
        kv = KVConfig(num_blocks=num_blocks, block_size=block_size, prefix_cache=prefix_cache)
        self.scheduler = Scheduler(self.config, kv, vocab_size=100)
        self.now_s = 0.0
        self.requests: dict[int, Request] = {}
        self.prompt_tokens: Counter[str] = Counter()
        self.output_tokens: Counter[str] = Counter()
        self.started: dict[int, float] = {}  # handle → when it first got a row
        self.ended: dict[int, str] = {}
        self._next_handle = 0

    def submit(
        self, num_prompt: int, num_output: int, *, tenant: str = "", priority: int = 0, deadline_s: float | None = None
    ) -> int:
        handle = self._next_handle
        request = Request(
            handle=handle,
            prompt_ids=(1,) * num_prompt,
            sampling=SamplingParams(max_tokens=num_output),
            arrival_s=self.now_s,
            deadline_s=deadline_s,
            priority=priority,
            tenant=tenant,
        )
        self.scheduler.submit(request, self.now_s)
        self._next_handle += 1
        self.requests[handle] = request
        return handle

    def plan(self) -> StepPlan | None:
        plan = self.scheduler.plan(self.now_s)
        for start in plan.starts if plan is not None else ():
            if start.handle not in self.started:
                self.started[start.handle] = self.now_s
                self.prompt_tokens[self.requests[start.handle].tenant] += start.num_prompt
        return plan

    def settle(self, plan: StepPlan) -> StepEvents:
        ids = np.ones(int(plan.samples.sum()), np.int32)
        events = self.scheduler.settle(plan, StepResult(plan.step, ids), self.now_s)
        for handle in events.handles.tolist():
            self.output_tokens[self.requests[handle].tenant] += 1
        self.ended.update((ending.handle, ending.reason) for ending in events.finished)
        return events

    def step(self, seconds: float = 1.0) -> StepPlan | None:
        """One step that takes so long."""
        plan = self.plan()
        self.now_s += seconds
        if plan is not None:
            self.settle(plan)
        self.ended.update((ending.handle, ending.reason) for ending in self.scheduler.take_endings())
        return plan
