"""What the scheduler keeps of every tenant: its line of waiting sequences, what it runs, and how much it was served."""

from __future__ import annotations

import heapq
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pageflight.core.tenants import Tenants
from pageflight.sched.sequence import Sequence, State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

UNLIMITED = sys.maxsize
_COMPACT_AT = 64


@dataclass(slots=True, eq=False)
class Tenant:
    """One tenant with its quotas resolved. Sequences that ended while waiting stay in `line` until they are met."""

    name: str
    number: int  # order in which tenants were first seen
    weight: float = 1.0
    max_waiting: int = UNLIMITED
    max_running: int = UNLIMITED
    max_blocks: int = UNLIMITED
    num_open: int = 0  # sequences, wherever they are
    num_running: int = 0  # of them, those that hold a row
    num_blocks: int = 0  # that its running sequences need at their full length
    line: list[tuple[tuple[float, int], Sequence]] = field(default_factory=list)  # heap by rank
    num_ended: int = 0  # of the line
    ticket: int = 0  # its valid entry among the queue's tenants; 0 while it has none
    served: float = 0.0  # virtual counter (`FairShare`) while it has no lane
    lane: int = -1  # place of its counter while it runs something

    def head(self) -> Sequence | None:
        """Its waiting sequence of the best rank."""
        line = self.line
        while line and line[0][1].state is not State.WAITING:
            heapq.heappop(line)
            self.num_ended -= 1
        return line[0][1] if line else None

    def push(self, sequence: Sequence) -> None:
        heapq.heappush(self.line, (sequence.rank, sequence))

    def forget_one(self) -> None:
        """One of the line has ended."""
        self.num_ended += 1
        if self.num_ended > _COMPACT_AT and 2 * self.num_ended > len(self.line):
            self.line = [item for item in self.line if item[1].state is State.WAITING]
            heapq.heapify(self.line)
            self.num_ended = 0

    @property
    def num_waiting(self) -> int:
        return len(self.line) - self.num_ended

    def may_start(self, num_blocks: int) -> bool:
        """Whether a sequence of so many blocks at full length is within its quotas.

        One alone always is: what was accepted under larger quotas is still served.
        """
        if not self.num_running:
            return True
        return self.num_running < self.max_running and self.num_blocks + num_blocks <= self.max_blocks


class TenantBook:
    """All tenants with open sequences, and those whose past still counts: `is_past` says when it does no more."""

    def __init__(self, tenants: Tenants, num_blocks: int, is_past: Callable[[Tenant], bool]) -> None:
        self._tenants, self._num_blocks, self._is_past = tenants, num_blocks, is_past
        self._by_name: dict[str, Tenant] = {}
        self._next_number = 0
        self._sweep_at = _COMPACT_AT

    def __iter__(self) -> Iterator[Tenant]:
        return iter(self._by_name.values())

    def named(self, name: str) -> Tenant:
        """The tenant of that name, made when it is met first."""
        known = self._by_name.get(name)
        if known is not None:
            return known
        if len(self._by_name) >= self._sweep_at:
            kept = {item.name: item for item in self if item.num_open or not self._is_past(item)}
            self._by_name, self._sweep_at = kept, max(_COMPACT_AT, 2 * len(kept))
        tenant = Tenant(name, self._next_number)
        self._next_number += 1
        self._by_name[name] = tenant
        self._resolve(tenant)
        return tenant

    def change(self, tenants: Tenants) -> None:
        """Other shares from now on."""
        self._tenants = tenants
        for tenant in self:
            self._resolve(tenant)

    def _resolve(self, tenant: Tenant) -> None:
        share = self._tenants.share_of(tenant.name)
        tenant.weight = share.weight
        tenant.max_waiting = UNLIMITED if share.max_waiting is None else share.max_waiting
        tenant.max_running = UNLIMITED if share.max_running is None else share.max_running
        tenant.max_blocks = UNLIMITED if share.kv_share == 1 else max(1, int(share.kv_share * self._num_blocks))
