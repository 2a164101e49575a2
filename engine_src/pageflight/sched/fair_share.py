"""Weighted fair sharing between tenants by virtual token counters.

Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). A tenant's counter grows with the service it
gets, prompt tokens when a prompt starts and output tokens step by step, divided by its weight. The next row goes to the
tenant with the smallest counter among those with something to start. A tenant that comes (back) to wait is lifted to
the smallest counter of those that wait, or to that of the last one that left when nobody does: time without requests
earns no claim on the future. Two tenants that wait all the time are then served within 2 × max(INPUT_COST × longest
prompt, OUTPUT_COST × tokens that fit the cache) ÷ smaller weight of their due shares, over any interval (theorem 4.4).
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from pageflight.core.config import SchedulerConfig
from pageflight.sched.order import Key, Order
from pageflight.sched.sequence import Sequence
from pageflight.sched.tenants import Tenant

INPUT_COST, OUTPUT_COST = 1.0, 2.0
"""Service of a prompt and of an output token, as in the paper: an output token costs a step's share of bandwidth."""


class FairShare(Order):
    """`fair`. Counters of tenants that run something sit in arrays by *lane*, so a step charges all of them at once."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self._counters = np.zeros(config.max_num_seqs, np.float64)  # [lanes]
        self._token_costs = np.zeros(config.max_num_seqs, np.float64)  # [lanes] of an output token, by weight
        self._free_lanes = list(range(config.max_num_seqs))
        self._floor = 0.0  # where the last tenant that joined had to begin at least; never sinks
        self._last_left: Tenant | None = None

    def counter(self, tenant: Tenant) -> float:
        """Service of the tenant ÷ its weight, counted from where it was lifted to."""
        return float(self._counters[tenant.lane]) if tenant.lane >= 0 else tenant.served

    def key(self, tenant: Tenant) -> Key:
        return self.counter(tenant), tenant.number

    def goes_before(self, one: Sequence, other: Sequence) -> bool:
        if one.tenant is other.tenant:
            return one.rank < other.rank
        return self.key(one.tenant) < self.key(other.tenant)

    def place(self, prefilling: list[Sequence], sequence: Sequence) -> None:
        prefilling.append(sequence)  # whose turn it was is decided; a high priority is worth nothing among tenants

    def excess(self, lanes_R: NDArray[np.int32]) -> NDArray[np.float64] | None:
        return self._counters[lanes_R]

    def joins(self, tenant: Tenant, first: Tenant | None) -> None:
        first = first or self._last_left
        if first is not None:
            self._floor = max(self._floor, self.counter(first))
        self._set(tenant, max(self.counter(tenant), self._floor))

    def leaves(self, tenant: Tenant) -> None:
        self._last_left = tenant

    def starts(self, tenant: Tenant) -> None:
        tenant.lane = heapq.heappop(self._free_lanes)
        self._counters[tenant.lane] = tenant.served
        self._token_costs[tenant.lane] = OUTPUT_COST / tenant.weight

    def stops(self, tenant: Tenant) -> None:
        tenant.served = float(self._counters[tenant.lane])
        heapq.heappush(self._free_lanes, tenant.lane)
        tenant.lane = -1

    def serves_prompt(self, tenant: Tenant, num_tokens: int) -> None:
        self._set(tenant, self.counter(tenant) + INPUT_COST * num_tokens / tenant.weight)

    def serves_outputs(self, lanes_L: NDArray[np.int32]) -> None:
        self._counters += np.bincount(lanes_L, minlength=len(self._counters)) * self._token_costs

    def is_past(self, tenant: Tenant) -> bool:
        return tenant is not self._last_left and self.counter(tenant) <= self._floor

    def reweigh(self, tenant: Tenant) -> None:
        if tenant.lane >= 0:
            self._token_costs[tenant.lane] = OUTPUT_COST / tenant.weight

    def _set(self, tenant: Tenant, counter: float) -> None:
        if tenant.lane >= 0:
            self._counters[tenant.lane] = counter
        else:
            tenant.served = counter
