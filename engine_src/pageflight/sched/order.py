"""In which order sequences are served: the policies `fcfs` and `priority`, and what `FairShare` does differently.

Within a tenant, and between all sequences where tenants do not matter, the order is that of a *rank*, which never
changes while a sequence is open. So ageing costs nothing: a sequence that gains one level of priority in `ageing_s`
seconds is one whose arrival counts as `priority` × `ageing_s` seconds earlier than it was.
"""

from __future__ import annotations

from bisect import insort

import numpy as np
from numpy.typing import NDArray

from pageflight.core.config import SchedulerConfig
from pageflight.core.request import Request
from pageflight.sched.sequence import Sequence
from pageflight.sched.tenants import Tenant

Key = tuple[float, int]


class Order:
    """`fcfs` and `priority`: the smallest rank goes first, whosever it is."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._by_priority = config.scheduling_policy != "fcfs"
        self._ageing_s = config.ageing_s

    def rank(self, request: Request, serial: int, now_s: float) -> Key:
        """The rank of a sequence that is submitted now; smaller goes first, `serial` decides between equals."""
        arrival_s = min(request.arrival_s, now_s)  # one that a restarted core takes over keeps its place
        if not self._by_priority:
            return arrival_s, serial
        if not self._ageing_s:
            return -float(request.priority), serial
        return arrival_s - request.priority * self._ageing_s, serial

    def key(self, tenant: Tenant) -> Key:
        """Which tenant the next free row is offered to: the smallest. Grows only, unless a sequence is pushed."""
        return tenant.line[0][0]

    def goes_before(self, one: Sequence, other: Sequence) -> bool:
        """Whether `one` would be started before `other`."""
        return one.rank < other.rank

    def place(self, prefilling: list[Sequence], sequence: Sequence) -> None:
        """Put a sequence that was just started among those whose prompts are under way."""
        insort(prefilling, sequence, key=lambda item: item.rank)

    def excess(self, lanes_R: NDArray[np.int32]) -> NDArray[np.float64] | None:
        """How much more than others the tenants of rows with these lanes were served; None where it does not matter."""

    # ---- what a policy that keeps accounts is told

    def joins(self, tenant: Tenant, first: Tenant | None) -> None:
        """`tenant`, of which nothing could be started, waits again; `first` is the first of those that wait."""

    def leaves(self, tenant: Tenant) -> None:
        """Nothing of `tenant` waits any more, or what waits may not start."""

    def starts(self, tenant: Tenant) -> None:
        """`tenant` is about to get its first row."""

    def stops(self, tenant: Tenant) -> None:
        """`tenant` has lost its last row."""

    def serves_prompt(self, tenant: Tenant, num_tokens: int) -> None:
        """A prompt of `tenant` was started for the first time."""

    def serves_outputs(self, lanes_L: NDArray[np.int32]) -> None:
        """A step brought one output token for each of these lanes."""

    def reweigh(self, tenant: Tenant) -> None:
        """The weight of `tenant` has changed; what it was served before counts as it did."""

    def is_past(self, tenant: Tenant) -> bool:
        """Whether a tenant with nothing open can be forgotten."""
        return True
