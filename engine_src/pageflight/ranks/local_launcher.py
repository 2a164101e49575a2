"""Ranks that are children of this process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe

from pageflight.models.stages import Place
from pageflight.ranks.launcher import Ended

LOOPBACK = "127.0.0.1"


class LocalRank:
    """A child process. It dies with the thread that started it."""

    def __init__(self, rank: int) -> None:
        self.rank, self.name = rank, f"rank {rank}"
        self.line, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", "pageflight.runners.rank_worker"]
            command += [f"--line-fd={theirs.fileno()}", f"--parent-pid={os.getpid()}", f"--device-index={rank}"]
            self._process = subprocess.Popen(
                command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, env=worker_environment()
            )

    line: Connection

    def hang_up(self) -> None:
        self.line.close()

    def wait(self, timeout_s: float | None = None) -> Ended | None:
        try:
            return ended(self._process.wait(timeout_s))
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        self._process.kill()


class LocalLauncher:
    """Starts ranks on this machine, whose devices are numbered as they are."""

    host, device_index = LOOPBACK, 0

    def start(self, places: Sequence[Place]) -> Sequence[LocalRank]:
        started: list[LocalRank] = []
        try:
            for place in places:
                started.append(LocalRank(place.rank))
        except BaseException:
            dismiss(started)
            raise
        return started

    def close(self) -> None: ...


def ended(code: int) -> Ended:
    """Of a process with this return code."""
    return Ended(words=f"signal {-code}" if code < 0 else f"exit status {code}", return_code=code)


def worker_environment() -> dict[str, str]:
    """Of a process that imports what this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def dismiss(ranks: Sequence[LocalRank]) -> None:
    """Kill ranks of a start that failed."""
    for rank in ranks:
        rank.kill()
        rank.wait()
        rank.hang_up()
