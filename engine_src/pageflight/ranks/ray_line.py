"""The core's end of the line to its Ray driver."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Pipe

from pageflight.core.errors import STATUS, ConfigError, PageflightError, RanksMissing
from pageflight.ranks.launcher import Ended, Progress
from pageflight.ranks.local_launcher import worker_environment
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

log = logging.getLogger(__name__)

CLOSE_S = 5.0
"""For the driver to give back what Ray has set aside. It is killed then, which gives it back as well."""
_SPARE_S = 10.0
"""What the driver has beyond its limit to say by itself what is missing."""
_ERRORS = {cls.__name__: cls for cls in STATUS}


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
        """Block until there is room. Raises RanksMissing, ConfigError."""
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
        self._line.close()
        deadline_s = time.monotonic() + CLOSE_S
        try:
            self._process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()

    def _read(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                message = decode_from_driver(self._line.recv_bytes())
                if isinstance(message, Waiting):
                    self._progress(message.words)
                elif isinstance(message, Over):
                    self._end([message.rank], Ended(words=message.words, return_code=message.return_code))
                else:
                    self._settle(message)
        if not self._is_closing:
            self._lost()

    def _lost(self) -> None:
        """The driver has ended; what it asked Ray for has ended with it."""
        code = self._process.wait()
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        words = f"the core's Ray driver ended ({how})"
        self._settle(RanksMissing(words))
        # No stream can have caused it.
        self._end(range(self._wanted.num_nodes * self._wanted.ranks_per_node), Ended(words=words, return_code=-9))
