"""The seam between scheduling and execution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pageflight.core.plan import StepPlan, StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerLimits:
    """What the scheduler must know of the runner it plans for."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_model_len: int
    vocab_size: int
    token_tile: int = 1
    num_host_blocks: int = 0
    host_copy_s: float = 0.0  # seconds of copying one block between device and host, as measured
    replay_rows: int = 1
    max_in_flight: int = 1  # steps that may be submitted before the first of them is collected


class Runner(Protocol):
    """Executes plans in order. Mirrors rows and block tables from the plans' differences."""

    limits: RunnerLimits

    def submit(self, plan: StepPlan) -> None:
        """Apply the plan's differences and begin its forward pass."""

    def collect(self) -> StepResult:
        """Wait for the submitted plan, sample, and return the ids."""

    def close(self) -> None: ...


@runtime_checkable
class SparingRunner(Protocol):
    """A runner that gives up what it can spare when its device is short of memory."""

    num_shortages: int  # how often it has, and the step ran after all


@runtime_checkable
class StagingRunner(Protocol):
    """A runner that can prepare a step while another one runs."""

    def stage(self, plan: StepPlan) -> None:
        """`plan` will be submitted after the step in flight is collected: prepare what does not depend on its ids."""


@runtime_checkable
class SharedRunner(Protocol):
    """A runner of several ranks, which wait for each other."""

    @property
    def idle_share(self) -> float:
        """Of the time in which steps were under way of late, what ranks did not compute; 0 where nobody knows."""


@runtime_checkable
class BusyRunner(Protocol):
    """A runner that knows for how long it has computed, other than waited for others."""

    busy_s: float
