"""The core's end of the line to its Ray driver."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing.connection import Pipe

from pageflight.core.errors import ConfigError, PageflightError, RankLost, RanksMissing
from pageflight.ranks.launcher import Ended, Progress
from pageflight.ranks.local_launcher import ended, worker_environment
from pageflight.ranks.ray_messages import (
    Over,
    Placed,
    Refused,
    ToDriver,
    Waiting,
    Wanted,
    decode_from_driver,
    encode,
)

CLOSE_S = 5.0
"""For the driver to give back what Ray has set aside. It is killed then, which gives it back as well."""
_SPARE_S = 10.0
"""What the driver has beyond its limit to say by itself what is missing."""
_ERRORS = {cls.__name__: cls for cls in (ConfigError, RanksMissing)}


class RayLine:
    """A process that is a driver of a Ray cluster for this one. It dies with the thread that makes this."""

    def __init__(self, wanted: Wanted, progress: Progress) -> None:
        """Raises ConfigError where Ray is not installed."""
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("launcher='ray': Ray is not installed; pip install 'pageflight[ray]'")
        self._wanted, self._progress = wanted, progress
        self._changed = threading.Condition()
        self._outcome: Placed | PageflightError | None = None
        self._over: dict[int, Ended] = {}
        self._on_over: dict[int, Callable[[], None]] = {}
        self._is_closing = False
        self._line, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", "pageflight.ranks.ray_driver"]
            command += [f"--line-fd={theirs.fileno()}", f"--parent-pid={os.getpid()}"]
            self._process = subprocess.Popen(
                command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, env=worker_environment()
            )
        self._reader = threading.Thread(target=self._read, name="ray-line", daemon=True)
        self._reader.start()
        self.send(wanted)

    def placed(self) -> Placed:
        """Block until there is room. Raises RanksMissing, ConfigError, RankLost where the driver died."""
        limit_s = self._wanted.wait_s + _SPARE_S
        with self._changed:
            self._changed.wait_for(lambda: self._outcome is not None, limit_s)
            outcome = self._outcome
        if outcome is None:
            address = self._wanted.address
            raise RanksMissing(f"the Ray cluster at ray_address={address!r} does not answer for {limit_s:g} s")
        if isinstance(outcome, PageflightError):
            raise outcome
        return outcome

    def send(self, message: ToDriver) -> None:
        with suppress(OSError):  # it has ended: who waits for it, or for a rank, learns of that
            self._line.send_bytes(encode(message))

    def on_over(self, rank: int, call: Callable[[], None]) -> None:
        """`call` when the rank has ended, or has already; by any thread."""
        with self._changed:
            if rank not in self._over:
                self._on_over[rank] = call
                return
        call()

    def over(self, rank: int, wait_s: float = 0.0) -> Ended | None:
        """How the rank has ended, as far as Ray knows."""
        with self._changed:
            self._changed.wait_for(lambda: rank in self._over, wait_s)
            return self._over.get(rank)

    def close(self) -> None:
        """Give back what Ray has set aside, and end the driver."""
        self._is_closing = True
        with socket.socket(fileno=os.dup(self._line.fileno())) as ours:
            ours.shutdown(socket.SHUT_WR)  # the driver's end of file; closing would not be, while the line is read
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._line.close()

    def _read(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                message = decode_from_driver(self._line.recv_bytes())
                if isinstance(message, Waiting):
                    self._progress(message.words)
                elif isinstance(message, Over):
                    self._end((message.rank,), Ended(words=message.words, return_code=message.return_code))
                elif isinstance(message, Refused):
                    self._settle(_ERRORS[message.error](message.message))
                else:
                    self._settle(message)
        if not self._is_closing:
            words = f"the core's Ray driver ended ({ended(self._process.wait()).words})"
            # Whatever ended it was no stream's doing. Ranks end with it.
            self._settle(RankLost(words, -signal.SIGKILL))
            ranks = range(self._wanted.num_nodes * self._wanted.ranks_per_node)
            self._end(ranks, Ended(words=words, return_code=-signal.SIGKILL))

    def _settle(self, outcome: Placed | PageflightError) -> None:
        with self._changed:
            self._outcome = self._outcome or outcome
            self._changed.notify_all()

    def _end(self, ranks: Iterable[int], how: Ended) -> None:
        with self._changed:
            self._over = {**dict.fromkeys(ranks, how), **self._over}
            calls = [call for rank in ranks if (call := self._on_over.pop(rank, None)) is not None]
            self._changed.notify_all()
        for call in calls:
            call()
