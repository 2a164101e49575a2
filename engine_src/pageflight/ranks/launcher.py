"""What starts ranks, whatever that is, and what it has of each: a line, a name, and how it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Protocol

from pageflight.models.stages import Place

Progress = Callable[[str], None]
"""Told what a start waits for, in words for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a rank has ended: in words, and as `subprocess` has it where that is known.

    None speaks against the streams that were open: use the code of a signal that kills where nobody can know.
    """

    words: str
    return_code: int | None


class RankHandle(Protocol):
    """A rank that has been started and can be talked to. `name` is for people, as in "rank 9 on node-b"."""

    @property
    def rank(self) -> int: ...

    @property
    def name(self) -> str: ...

    @property
    def line(self) -> Connection:
        """Carries messages of `ranks.messages`, never pickles: `send_bytes` and `recv_bytes` only."""
        ...

    def hang_up(self) -> None:
        """End the line, which tells the rank to end."""
        ...

    def wait(self, timeout_s: float | None = None) -> Ended | None:
        """Block until it has ended; None where it has not within `timeout_s`. By any thread."""
        ...

    def kill(self) -> None:
        """End it now, as far as that is possible from here. No error where it has ended."""
        ...


class Launcher(Protocol):
    """Starts ranks once."""

    @property
    def host(self) -> str:
        """Address of this process's machine under which all ranks reach it; known once `start` has returned."""
        ...

    @property
    def device_index(self) -> int:
        """The first rank's GPU, of those that this process sees; known once `start` has returned."""
        ...

    def start(self, places: Sequence[Place]) -> Sequence[RankHandle]:
        """A handle for each, in this order; waits for those that others start. Raises RanksMissing, ConfigError; what
        had been started is gone then. The kernel may end local ranks with the *thread* that calls this."""
        ...

    def close(self) -> None:
        """Let go of what is left when all handles have ended: ports, reservations. Also after a start that failed."""
        ...
