"""How many steps the state machines have made."""

from __future__ import annotations

from collections import Counter

from hypothesis.stateful import RuleBasedStateMachine, invariant

STEPS: Counter[str] = Counter()
"""By the machine's name."""


class Counted(RuleBasedStateMachine):
    """A machine whose steps are counted: what it does is looked at once before the first and once after each."""

    def __init__(self) -> None:
        super().__init__()
        STEPS[type(self).__name__] -= 1

    @invariant()
    def counted(self) -> None:
        STEPS[type(self).__name__] += 1
