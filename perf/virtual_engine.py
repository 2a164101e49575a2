"""An engine in virtual time: the fake runner, whose every step moves a clock by what a real one would have taken."""

from __future__ import annotations

from pageflight.core.plan import StepPlan, StepResult
from pageflight.loop.clock import ManualClock
from pageflight.runners.base import RunnerLimits
from pageflight.runners.fake import FakeRunner
from pageflight.sched.pacing import in_tiles, num_pairs
from pageflight.sched.step_time import Load, StepCosts


def load_of(plan: StepPlan, token_tile: int) -> Load:
    """What the time of a step is made of, read from its plan: rows of one sampling token decode."""
    decodes = (plan.lengths == 1) & plan.samples
    chunks = zip(plan.starts_at[~decodes].tolist(), plan.lengths[~decodes].tolist(), strict=True)
    return Load(
        num_rows=int(decodes.sum()),
        num_positions=int((plan.starts_at[decodes] + 1).sum()),
        num_tokens=in_tiles(plan.num_tokens, token_tile),
        num_pairs=sum(num_pairs(start, length) for start, length in chunks),
    )


class VirtualRunner(FakeRunner):
    """Moves `clock` by `costs` of every step, and by `limits.host_copy_s` for every block copied out or in."""

    def __init__(self, limits: RunnerLimits, costs: StepCosts, clock: ManualClock) -> None:
        super().__init__(limits)
        self._costs, self._clock = costs, clock

    def collect(self) -> StepResult:
        plan = self._in_flight
        assert plan is not None, "nothing was submitted"
        copied = (plan.copy_out_blocks, plan.copy_in_blocks)
        num_copies = sum(blocks.size for blocks in copied if blocks is not None)
        seconds = self._costs.of(load_of(plan, self.limits.token_tile)) + num_copies * self.limits.host_copy_s
        self._clock.advance(seconds)
        return super().collect()
