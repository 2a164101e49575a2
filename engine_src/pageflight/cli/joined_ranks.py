"""Ranks of this machine that join a leader: a process each, that dials in and is started again when it has ended."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pageflight.cli.errors import CommandError
from pageflight.ranks.dialing import ENDED, NO_LEADER, REFUSED
from pageflight.ranks.local_launcher import ended, worker_environment

log = logging.getLogger(__name__)

_LOOK_S = 0.1
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _LONG_LIFE_S = 0.5, 5.0, 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Joining:
    """Which ranks join whom. `devices`: by rank, the GPU of those that are seen here, where there are any.

    `verifies`: the first of them hashes the engine's files, for its machine.
    """

    engine_dir: Path
    leader: tuple[str, int]
    devices: Mapping[int, int]
    leader_timeout_s: float
    verifies: bool = True


class _Rank:
    """One rank's processes, one after another."""

    def __init__(self, joining: Joining, rank: int) -> None:
        host, port = joining.leader
        self.rank = rank
        self._command = [
            *(sys.executable, "-m", "pageflight.runners.rank_worker"),
            f"--connect=[{host}]:{port}",
            f"--rank={rank}",
            f"--device-index={joining.devices[rank]}",
            f"--wait-s={joining.leader_timeout_s}",
            f"--engine-dir={joining.engine_dir}",
            f"--parent-pid={os.getpid()}",
        ]
        if joining.verifies and rank == min(joining.devices):
            self._command.append("--verify")
        self._pause_s = _FIRST_PAUSE_S
        self._next_s = 0.0
        self.process: subprocess.Popen[bytes] | None = None

    def look(self, tell: Callable[[str], None]) -> None:
        """Start it where it is due, and again after its end. Raises CommandError where there is no sense in that."""
        now_s = time.monotonic()
        if self.process is None:
            if now_s >= self._next_s:
                self._born_s = now_s
                self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, env=worker_environment())
            return
        code = self.process.poll()
        if code is None:
            return
        self.process = None
        if code == NO_LEADER:
            raise CommandError(f"rank {self.rank} has found no leader that takes it; see above")
        if code == REFUSED:
            raise CommandError(f"rank {self.rank} was refused; see above")
        if code == ENDED:
            tell(f"rank {self.rank}: the leader has ended the line; it dials in again")
            self._pause_s, self._next_s = _FIRST_PAUSE_S, 0.0
            return
        if now_s - self._born_s > _LONG_LIFE_S:
            self._pause_s = _FIRST_PAUSE_S
        tell(f"rank {self.rank} died ({ended(code).words}); it dials in again in {self._pause_s:g} s")
        self._next_s, self._pause_s = now_s + self._pause_s, min(2 * self._pause_s, _LONGEST_PAUSE_S)


def keep_joined(joining: Joining, tell: Callable[[str], None]) -> None:
    """Until KeyboardInterrupt. Raises CommandError where no leader takes a rank."""
    ranks = [_Rank(joining, rank) for rank in sorted(joining.devices)]
    try:
        while True:
            for rank in ranks:
                rank.look(tell)
            time.sleep(_LOOK_S)
    finally:
        for rank in ranks:
            if rank.process is not None:
                rank.process.send_signal(signal.SIGKILL)
                rank.process.wait()
