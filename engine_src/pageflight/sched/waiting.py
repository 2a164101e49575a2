"""Sequences without a row. Every tenant has a line of its own, and the policy says whose head is next.

So a tenant at its quota holds nobody up, and no operation looks at more than a few of the waiting.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection

from pageflight.sched.order import Key, Order
from pageflight.sched.sequence import Sequence, State
from pageflight.sched.tenants import Tenant

_COMPACT_AT = 64


class WaitingQueue:
    """A heap of the tenants with something to start, over their lines.

    A tenant's entry holds its key as of when it was made. Keys of a policy only grow until a better sequence is pushed,
    which makes a new entry; so the first entry whose key still holds is the first of all. Tenants whose head may not
    start, by their quotas, have no entry until one of their rows is free again. `num_blocks_of` tells how many blocks a
    sequence needs at full length.
    """

    def __init__(self, order: Order, num_blocks_of: Callable[[Sequence], int]) -> None:
        self._order, self._num_blocks_of = order, num_blocks_of
        self._heap: list[tuple[Key, int, Tenant]] = []
        self._next_ticket = 1
        self._num_entered = 0  # tenants with a valid entry
        self._len = 0
        self.num_tokens = 0
        """Prompt tokens of all that wait."""

    def __len__(self) -> int:
        return self._len

    def push(self, sequence: Sequence) -> None:
        assert sequence.state is State.WAITING
        tenant = sequence.tenant
        head = tenant.head()
        tenant.push(sequence)
        self._len += 1
        self.num_tokens += sequence.num_prompt
        if not tenant.ticket or head is None or sequence.rank < head.rank:
            self._enter(tenant)

    def peek(self) -> Sequence | None:
        """The sequence to be started next, or None."""
        first = self._first()
        return first.head() if first is not None else None

    def pop(self) -> Sequence:
        first = self._first()
        assert first is not None, "nothing waits, or nothing may start"
        sequence = first.head()
        assert sequence is not None
        heapq.heappop(first.line)
        self._len -= 1
        self.num_tokens -= sequence.num_prompt
        if first.head() is None:
            self._leave(first)
        return sequence

    def forget(self, sequence: Sequence) -> None:
        """`sequence`, whose state the caller has set to ENDED, no longer counts."""
        assert sequence.state is State.ENDED
        tenant = sequence.tenant
        tenant.forget_one()
        self._len -= 1
        self.num_tokens -= sequence.num_prompt
        if tenant.ticket and not tenant.num_waiting:
            self._leave(tenant)
        self.reconsider(tenant)  # its next one may be within the quotas

    def reconsider(self, tenant: Tenant) -> None:
        """The tenant's quotas, or what it runs, have changed."""
        if not tenant.ticket and tenant.head() is not None:
            self._enter(tenant)

    def may_overtake(self, sequence: Sequence) -> bool:
        """Whether `sequence`, which does not wait, may start now and before all that wait."""
        if not sequence.tenant.may_start(self._num_blocks_of(sequence)):
            return False
        first = self.peek()
        return first is None or self._order.goes_before(sequence, first)

    def _first(self) -> Tenant | None:
        heap = self._heap
        while heap:
            key, ticket, tenant = heap[0]
            if ticket != tenant.ticket:
                heapq.heappop(heap)
                continue
            head = tenant.head()
            if head is None or not tenant.may_start(self._num_blocks_of(head)):
                self._leave(tenant)
                continue
            key_now = self._order.key(tenant)
            if key_now == key:
                return tenant
            heapq.heapreplace(heap, (key_now, self._new_ticket(tenant), tenant))
        return None

    def _enter(self, tenant: Tenant) -> None:
        if not tenant.ticket:
            self._order.joins(tenant, self._first())
            self._num_entered += 1
        heapq.heappush(self._heap, (self._order.key(tenant), self._new_ticket(tenant), tenant))
        if len(self._heap) > 2 * self._num_entered + _COMPACT_AT:
            self._heap = [entry for entry in self._heap if entry[1] == entry[2].ticket]
            heapq.heapify(self._heap)

    def _leave(self, tenant: Tenant) -> None:
        tenant.ticket = 0  # its entry is dropped when it is met
        self._num_entered -= 1
        self._order.leaves(tenant)

    def _new_ticket(self, tenant: Tenant) -> int:
        tenant.ticket = self._next_ticket
        self._next_ticket += 1
        return tenant.ticket

    def check(self, waiting: Collection[Sequence]) -> None:
        """Assert that exactly `waiting` are counted, and that whoever may start is found."""
        assert len(self) == len(waiting) and self.num_tokens == sum(sequence.num_prompt for sequence in waiting)
        valid = [entry[2] for entry in self._heap if entry[1] == entry[2].ticket]
        assert len(valid) == len({tenant.name for tenant in valid}) == self._num_entered
        for tenant in {sequence.tenant for sequence in waiting}:
            head = tenant.head()
            assert head is not None and head.rank == min(s.rank for s in waiting if s.tenant is tenant)
            may_start = tenant.may_start(self._num_blocks_of(head))
            assert tenant.ticket or not may_start, f"tenant {tenant.name!r} may start something and is not asked"
        keys = [entry[0] for entry in self._heap if entry[1] == entry[2].ticket]
        assert all(key <= self._order.key(tenant) for key, tenant in zip(keys, valid, strict=True) if tenant.head())
