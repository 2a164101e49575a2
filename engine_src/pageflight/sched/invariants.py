"""Every open sequence is in exactly one place: the queue, a row, or behind its leader."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pageflight.sched.rows import Rows
from pageflight.sched.sequence import Sequence, State
from pageflight.sched.waiting import WaitingQueue


def check_places(
    open_sequences: Mapping[int, Sequence], waiting: WaitingQueue, prefilling: list[Sequence], rows: Rows
) -> None:
    """Assert that states, rows and the queue agree with each other for all open sequences."""
    rows.check()
    waiting.check()
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
