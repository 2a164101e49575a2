"""Every open sequence is in exactly one place: the queue, a row, or behind its leader."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np

from pageflight.sched.rows import Rows
from pageflight.sched.sequence import Sequence, State
from pageflight.sched.tenants import Tenant
from pageflight.sched.waiting import WaitingQueue


def check_places(
    open_sequences: Mapping[int, Sequence], waiting: WaitingQueue, prefilling: list[Sequence], rows: Rows
) -> None:
    """Assert that states, rows and the queue agree with each other for all open sequences."""
    rows.check()
    waiting.check([sequence for sequence in open_sequences.values() if sequence.state is State.WAITING])
    num_in = dict.fromkeys(State, 0)
    for handle, sequence in open_sequences.items():
        num_in[sequence.state] += 1
        assert sequence.handle == handle
        in_row = sequence.state in (State.PREFILL, State.DECODE)
        assert (sequence.row >= 0) == in_row, f"sequence {handle} is {sequence.state} with row {sequence.row}"
        assert (sequence.leader is not None) == (sequence.state is State.FORKING)
        assert all(follower.leader is sequence for follower in sequence.followers)
        if sequence.leader is not None:
            assert sequence in sequence.leader.followers and sequence.leader.handle in open_sequences
    assert num_in[State.ENDED] == 0, "an ended sequence is still open"
    assert num_in[State.WAITING] == len(waiting), "a waiting sequence is not in the queue, or an ended one is"
    assert num_in[State.PREFILL] + num_in[State.DECODE] == rows.num_held, "a row's sequence is not open"
    assert {s.handle for s in prefilling} == {h for h, s in open_sequences.items() if s.state is State.PREFILL}
    assert len(prefilling) == num_in[State.PREFILL], "a sequence computes its prompt twice"
    for row in np.flatnonzero(rows.decoding).tolist():
        assert rows.held_by(row).state is State.DECODE, f"row {row} decodes before its prompt is computed"


def check_tenants(
    open_sequences: Collection[Sequence], tenants: Iterable[Tenant], full_blocks: Callable[[Sequence], int]
) -> None:
    """Assert that what is counted by tenant is what its sequences are and hold."""
    known = list(tenants)
    assert all(sequence.tenant in known for sequence in open_sequences), "a tenant with open sequences was forgotten"
    for tenant in known:
        mine = [sequence for sequence in open_sequences if sequence.tenant is tenant]
        running = [sequence for sequence in mine if sequence.row >= 0]
        assert tenant.num_open == len(mine) and tenant.num_running == len(running), f"tenant {tenant.name!r}"
        assert tenant.num_blocks == sum(map(full_blocks, running)), f"tenant {tenant.name!r}"
        assert tenant.num_waiting == sum(sequence.state is State.WAITING for sequence in mine)
        assert running or tenant.lane < 0, f"tenant {tenant.name!r} runs nothing and has a lane"
