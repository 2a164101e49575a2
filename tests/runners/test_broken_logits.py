"""A sequence whose logits are not finite ends alone."""

from __future__ import annotations

import numpy as np
from toy_model import ToyModel

from pageflight.core.config import KVConfig, SchedulerConfig
from pageflight.core.request import Request, SamplingParams
from pageflight.runners.local import LocalRunner
from pageflight.sched.scheduler import Scheduler

POISON = 13


class Poisoned(ToyModel):
    """Gives NaN for every row whose last token is POISON."""

    def wait(self):  # type: ignore[no-untyped-def]
        logits = super().wait().copy()
        logits[self.last_inputs.ids_T[self.last_inputs.take_L] == POISON] = np.nan
        return logits

    def start(self, inputs):  # type: ignore[no-untyped-def]
        self.last_inputs = inputs
        super().start(inputs)


def answers(prompts: list[tuple[int, ...]]) -> tuple[dict[int, list[int]], dict[int, str]]:
    """Ids and finish reasons by handle."""
    model = Poisoned()
    runner = LocalRunner(model, num_blocks=64, max_num_seqs=8, max_model_len=32)
    config = SchedulerConfig(max_num_seqs=8, max_num_tokens=32, max_model_len=32)
    scheduler = Scheduler(config, KVConfig(num_blocks=64, block_size=model.block_size), vocab_size=model.vocab_size)
    for handle, prompt in enumerate(prompts):
        scheduler.submit(Request(handle=handle, prompt_ids=prompt, sampling=SamplingParams(max_tokens=5)), 0.0)
    ids: dict[int, list[int]] = {handle: [] for handle in range(len(prompts))}
    reasons: dict[int, str] = {}
    while scheduler.has_work:
        plan = scheduler.plan(0.0)
        assert plan is not None
        runner.submit(plan)
        events = scheduler.settle(plan, runner.collect(), 0.0)
        scheduler.check()
        for handle, token in zip(events.handles.tolist(), events.ids.tolist(), strict=True):
            ids[handle].append(token)
        reasons |= {finished.handle: finished.reason for finished in events.finished}
    return ids, reasons


def test_the_others_go_on_as_if_it_had_not_been_there() -> None:
    """One poisoned prompt took the core, and every other request with it, down."""
    others = [(1, 2, 3), (4, 5), (6,)]
    alone, _ = answers(others)
    ids, reasons = answers([others[0], (7, POISON), *others[1:]])
    assert reasons[1] == "error"
    assert ids[1] == []
    assert [ids[0], ids[2], ids[3]] == list(alone.values())
    assert all(reasons[handle] in ("length", "error") for handle in (0, 2, 3))


def test_a_step_in_which_every_row_is_broken_ends_them_all() -> None:
    ids, reasons = answers([(POISON,), (1, POISON)])
    assert reasons == {0: "error", 1: "error"}
    assert ids == {0: [], 1: []}
