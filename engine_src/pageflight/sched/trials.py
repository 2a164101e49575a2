"""Sequences in whose steps a core has died: each runs alone for a moment, so that the next death has one cause."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from pageflight.sched.sequence import Sequence, State

TRIAL_TOKENS = 2
"""Of the shortest trial: a step that samples is followed by one that feeds the sampled token back, and either may be
the deadly one."""


class Trials:
    """The sequence on trial and those whose trial is to come, in order of arrival."""

    def __init__(self) -> None:
        self._held: deque[Sequence] = deque()  # those that ended meanwhile stay until they are met
        self._accused: Sequence | None = None
        self._num_left = 0  # tokens that plans of this trial have yet to bring
        self.num_held = 0

    def hold(self, sequence: Sequence) -> None:
        """`sequence` waits for its trial and holds nothing."""
        sequence.state = State.HELD
        self._held.append(sequence)
        self.num_held += 1

    def forget(self, sequence: Sequence) -> None:
        """`sequence` ended before its trial; the caller has set its state."""
        assert sequence.state is State.ENDED
        self.num_held -= 1

    @property
    def next(self) -> Sequence | None:
        """The sequence that must be alone in the next step; None if there is none."""
        accused = self._accused
        if accused is not None and (accused.row < 0 or self._num_left <= 0):
            self._accused = accused = None  # it ended, or is cleared
        if accused is not None:
            return accused
        while self._held and self._held[0].state is not State.HELD:
            self._held.popleft()
        return self._held[0] if self._held else None

    def begin(self, sequence: Sequence) -> None:
        """`sequence`, which was `next`, takes its row."""
        assert self._held[0] is sequence
        self._held.popleft()
        self.num_held -= 1
        self._accused, self._num_left = sequence, sequence.request.trial_tokens

    def planned(self, samples: bool, can_go_on: bool) -> None:
        """A step of the accused was planned; `can_go_on` False: it will have reached its full length."""
        self._num_left = self._num_left - samples if can_go_on else 0

    def check(self, open_sequences: Iterable[Sequence]) -> None:
        """Assert that exactly those in state HELD are held."""
        held = {sequence.handle for sequence in open_sequences if sequence.state is State.HELD}
        assert held == {s.handle for s in self._held if s.state is State.HELD} and len(held) == self.num_held
