"""The processes of the other ranks, as the first one sees them: started, told, listened to, watched."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe

from pageflight.core.errors import STATUS, PageflightError, RankLost
from pageflight.ranks.messages import Computed, Failed, FromRank, RankSpec, decode_from_rank, encode

log = logging.getLogger(__name__)

GRACE_S = 1.0
"""What the first rank has to find out by itself that another died: the sum that it waits for fails, if it does."""
CLOSE_S = 5.0
_TYPED = {cls.__name__: cls for cls in STATUS if cls.__init__ is PageflightError.__init__}
"""Errors that are their message."""

OnLoss = Callable[[PageflightError], None]


class RankProcesses:
    """One process for every rank but the first. They die with this process, whatever becomes of it.

    `on_loss` is called by another thread when one has died and nobody has asked `loss` for `GRACE_S`: the first rank
    may be waiting for it for ever, or have nothing to do.
    """

    def __init__(self, specs: Sequence[RankSpec], on_loss: OnLoss | None = None) -> None:
        self._on_loss = on_loss
        self._closing = threading.Event()
        self._lost = threading.Event()
        self._told = threading.Event()
        self._loss: PageflightError | None = None
        self._reading = threading.Lock()
        self._last_words: dict[int, Failed] = {}
        self._ranks: list[tuple[int, subprocess.Popen[bytes], Connection]] = []
        try:
            for spec in specs:
                self._start(spec.place.rank)
            for spec, (_, _, line) in zip(specs, self._ranks, strict=True):
                with suppress(BrokenPipeError, ConnectionResetError):  # it has ended: `wait_present` says why
                    line.send_bytes(encode(spec))
        except BaseException:
            self.dismiss(at_once=True)
            self.close()
            raise

    def _start(self, rank: int) -> None:
        ours, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", "pageflight.runners.rank_worker"]
            command += [f"--line-fd={theirs.fileno()}", f"--parent-pid={os.getpid()}"]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, env=environment)
        self._ranks.append((rank, process, ours))
        threading.Thread(target=self._watch, args=(rank, process), name=f"rank-{rank}", daemon=True).start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for _, process, _ in self._ranks]

    def wait_present(self) -> None:
        """Block until every process has come up. Raises what keeps one from it."""
        for rank, _, line in self._ranks:
            with suppress(EOFError, ConnectionResetError):
                message = decode_from_rank(line.recv_bytes())
                if not isinstance(message, Failed):
                    continue
                self._last_words[rank] = message
            raise self.loss(wait_s=GRACE_S) or RankLost(f"rank {rank} closed its line")

    def send(self, message: bytes) -> None:
        """To every rank. Raises the loss of one."""
        for rank, _, line in self._ranks:
            try:
                line.send_bytes(message)
            except (BrokenPipeError, ConnectionResetError):
                raise self.loss(wait_s=GRACE_S) or RankLost(f"rank {rank} closed its line") from None

    def computed(self) -> Iterator[tuple[int, Computed]]:
        """What ranks have said since the last call of the steps that they computed."""
        with self._reading:
            for rank, _, line in self._ranks:
                for message in self._read(rank, line):
                    if isinstance(message, Computed):
                        yield rank, message

    def loss(self, wait_s: float = 0.0) -> PageflightError | None:
        """Why the model is not whole any more; waits so long for the news. Who asks makes an end of it."""
        self._lost.wait(wait_s)
        if self._loss is not None:
            self._told.set()
        return self._loss

    def dismiss(self, *, at_once: bool) -> None:
        """Tell all processes to end. `at_once`: they may be waiting for a sum that never comes, and are killed."""
        self._closing.set()
        self._told.set()
        for _, process, line in self._ranks:
            if at_once:
                process.kill()
            line.close()

    def close(self) -> None:
        """Wait for the processes that were dismissed, but not for long."""
        deadline_s = time.monotonic() + CLOSE_S
        for _, process, _ in self._ranks:
            try:
                process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _read(self, rank: int, line: Connection) -> Iterator[FromRank]:
        with suppress(EOFError, OSError):  # it has ended; who watches it says why
            while line.poll():
                message = decode_from_rank(line.recv_bytes())
                if isinstance(message, Failed):
                    self._last_words[rank] = message
                yield message

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if self._closing.is_set():
            return
        with self._reading:
            for other, _, line in self._ranks:
                list(self._read(other, line))
            if self._loss is None:
                self._loss = self._reason(rank, code)
                self._lost.set()
        log.error("%s", self._loss)
        if not self._told.wait(GRACE_S) and self._on_loss is not None:
            self._on_loss(self._loss)

    def _reason(self, rank: int, code: int) -> PageflightError:
        words = self._last_words.get(rank)
        if words is not None and words.error in _TYPED:
            return _TYPED[words.error](words.message)
        if words is not None:
            return RankLost(f"rank {rank} failed: {words.error}: {words.message}")
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        return RankLost(f"rank {rank} died ({how})", return_code=code)
