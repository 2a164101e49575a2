"""How a core is watched at work: recorded, and checked."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from pageflight.core.errors import ConfigError

RECORD_VARIABLE, CHECK_VARIABLE = "PAGEFLIGHT_RECORD", "PAGEFLIGHT_CHECK_INVARIANTS"


class Watch(msgspec.Struct, frozen=True, kw_only=True):
    """A matter of one run, not of a repository."""

    record: str = ""
    """File to record to; `recorder.recording_path` gives every life of every core one of its own."""
    check_invariants: int = 0
    """Steps between two checks of every invariant; 0: none. A violation ends the core."""

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> Watch:
        """What a server was started with. Raises ConfigError."""
        count = environment.get(CHECK_VARIABLE) or "0"
        if not count.isascii() or not count.isdigit():
            raise ConfigError(f"{CHECK_VARIABLE}={count!r}: must be a number of steps, 0 for no checks")
        return cls(record=environment.get(RECORD_VARIABLE, ""), check_invariants=int(count))

    def to_environment(self) -> dict[str, str]:
        """The inverse of `of_environment`."""
        values = {RECORD_VARIABLE: self.record, CHECK_VARIABLE: str(self.check_invariants or "")}
        return {name: value for name, value in values.items() if value}
