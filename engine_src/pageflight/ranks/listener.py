"""Where ranks that others have started dial in."""

from __future__ import annotations

import errno
import logging
import math
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection

from pageflight import __version__
from pageflight.core.errors import ConfigError, RanksMissing
from pageflight.ranks.handshake import Caller, Hello, NotARank
from pageflight.ranks.launcher import Ended
from pageflight.ranks.network import keep_alive, wait_hang_up

log = logging.getLogger(__name__)

ANYWHERE = "0.0.0.0"
MOST_STRANGERS = 64
"""Of whom it is not known yet whether they are ranks: each costs a thread for some seconds. One more takes the place of
the oldest one of the address that has the most."""
LEAST_STAY_S = 0.25
"""What a stranger has at least, for a rank needs a moment to prove itself. Newcomers wait for it to be over."""
MOST_TOLD = 4
"""Of those who were not taken: who waits in vain is told of the last ones."""
TELL_S = 10.0
"""Between two lines of the log about strangers."""
_LOOK_S = 0.25
_NO_MORE = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class RemoteRank:
    """A rank that dialled in. All that is known of its end is that of its line."""

    def __init__(self, hello: Hello, peer: socket.socket) -> None:
        self.rank, self.name = hello.rank, f"rank {hello.rank} on {hello.host[:255]}"
        self.host: str = peer.getsockname()[0]
        """This machine's address, as the rank reached it."""
        self.line = Connection(os.dup(peer.fileno()))
        self._peer = peer

    def hang_up(self) -> None:
        self.line.close()
        with suppress(OSError):
            self._peer.shutdown(socket.SHUT_WR)

    def wait(self, timeout_s: float | None = None) -> Ended | None:
        if not wait_hang_up(self._peer.fileno(), timeout_s):
            return None
        return Ended(words="its line ended", return_code=-signal.SIGKILL)

    def kill(self) -> None:
        with suppress(OSError):
            self._peer.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.line.close()
        self._peer.close()


class RankListener:
    """Takes in the ranks of `expected`, each once, that have the key and are of this version. Others are refused.
    Strangers cannot keep the places where callers prove themselves, but many of them make ranks try more than once.
    Goes on refusing, with the reason, when all are there."""

    def __init__(self, expected: Collection[int], key: bytes, *, host: str = ANYWHERE, port: int = 0) -> None:
        """`port` 0: any that is free. Raises ConfigError for one that cannot be had."""
        self._expected, self._key = frozenset(expected), key
        self._ranks: dict[int, RemoteRank] = {}
        self._is_complete = False  # somebody else has the ranks now, and their ends are his affair
        self._changed = threading.Condition()
        self._refused: dict[str, str] = {}  # by address, why the last one was not taken
        self._strangers: dict[socket.socket, tuple[str, float]] = {}  # by age: address, and when it came
        self._told_s, self._num_untold = -math.inf, 0  # when the log was last told of strangers, and of how many not
        self._closing = threading.Event()
        try:
            self._socket = socket.create_server((host, port), backlog=128)
        except OSError as error:
            raise ConfigError(f"rank_port={port}: cannot listen on it: {error.strerror or error}") from None
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, name="rank-listener", daemon=True)
        self._thread.start()

    def wait(
        self, wait_s: float, missing: Callable[[Sequence[int]], None], check: Callable[[], None] = lambda: None
    ) -> list[RemoteRank]:
        """All expected ranks, in order; one that has gone again meanwhile must come again.

        `missing` is told which are not there yet, whenever that changes; `check` is called several times a second and
        ends the wait by what it raises. Raises RanksMissing after `wait_s`.
        """
        deadline_s, told = time.monotonic() + wait_s, None
        while True:
            check()
            with self._changed:
                for rank in [rank for rank, there in self._ranks.items() if there.wait(0.0)]:
                    log.warning("%s is gone again", self._ranks[rank].name)
                    self._ranks.pop(rank).close()
                absent = sorted(self._expected - self._ranks.keys())
                if not absent:
                    self._is_complete = True
                    return [self._ranks[rank] for rank in sorted(self._ranks)]
                left_s = deadline_s - time.monotonic()
                if left_s > 0 and absent == told:
                    self._changed.wait(min(left_s, _LOOK_S))
                    continue
            if left_s <= 0:
                others = "".join(f"; {address} was not taken: {why}" for address, why in self._refused.items())
                raise RanksMissing(
                    f"{named(absent)} did not dial in to port {self.port} within rank_wait_s={wait_s:g}{others}"
                )
            missing(absent)
            told = absent

    def close(self) -> None:
        """Stop listening and let go of all lines."""
        self._closing.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes who accepts
        self._thread.join()
        self._socket.close()
        with self._changed:
            for there in self._ranks.values():
                there.close()
            self._ranks.clear()
            for peer in self._strangers:
                with suppress(OSError):
                    peer.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                peer, address = self._socket.accept()
            except OSError as error:
                if error.errno in _NO_MORE:
                    self._closing.wait(_LOOK_S)
                continue
            self._make_room()
            with self._changed:
                self._strangers[peer] = address[0], time.monotonic()
            try:
                threading.Thread(target=self._meet, args=(peer, address[0]), name="rank-stranger", daemon=True).start()
            except RuntimeError as error:  # no more threads, now
                with self._changed:
                    self._strangers.pop(peer, None)
                peer.close()
                self._turn_away(address[0], str(error))
                self._closing.wait(_LOOK_S)

    def _make_room(self) -> None:
        """Have the oldest stranger of the address with the most end, once it has had its time, where there are too
        many."""
        while not self._closing.is_set():
            with self._changed:
                if len(self._strangers) < MOST_STRANGERS:
                    return
                each = Counter(address for address, _ in self._strangers.values())
                most = max(each, key=lambda address: each[address])
                peer, since_s = next((peer, since_s) for peer, (at, since_s) in self._strangers.items() if at == most)
                left_s = since_s + LEAST_STAY_S - time.monotonic()
                if left_s <= 0:
                    del self._strangers[peer]
                    with suppress(OSError):
                        peer.shutdown(socket.SHUT_RDWR)  # its thread closes it
                    return
            self._closing.wait(left_s)

    def _meet(self, peer: socket.socket, address: str) -> None:
        is_taken = False
        try:
            keep_alive(peer)
            caller = Caller(peer, self._key)
            with self._changed:
                self._strangers.pop(peer, None)
                refused, is_final = self._refusal(caller.hello)
                if refused:
                    self._turn_away(f"{address} ({caller.hello.host})", refused, is_stranger=False)
                caller.answer(refused, is_final=is_final)
                is_taken = not refused
                if is_taken:
                    self._ranks[caller.hello.rank] = there = RemoteRank(caller.hello, peer)
                    self._changed.notify_all()
            if is_taken:
                log.info("%s is here, from %s", there.name, address)
        except (NotARank, OSError) as error:
            with self._changed:
                had_to_go = peer not in self._strangers
            self._turn_away(address, "too many came after it" if had_to_go else str(error))
        finally:
            with self._changed:
                self._strangers.pop(peer, None)
                if not is_taken:
                    peer.close()

    def _turn_away(self, address: str, why: str, *, is_stranger: bool = True) -> None:
        now_s = time.monotonic()
        with self._changed:
            if self._refused.get(address) != why:  # and not each time that it tries again
                if is_stranger and now_s < self._told_s + TELL_S:
                    self._num_untold += 1
                else:
                    others = f" (and {self._num_untold} more before)" if is_stranger and self._num_untold else ""
                    log.warning("%s was not taken: %s%s", address, why, others)
                    if is_stranger:
                        self._told_s, self._num_untold = now_s, 0
            self._refused[address] = why
            while len(self._refused) > MOST_TOLD:
                del self._refused[next(iter(self._refused))]

    def _refusal(self, hello: Hello) -> tuple[str, bool]:
        """Why a rank that has the key is not taken, if it is not; and whether it never will be."""
        rank = hello.rank
        if hello.version != __version__:
            return f"rank {rank} is of pageflight {hello.version}, the leader of {__version__}", True
        if rank not in self._expected:
            return f"rank {rank} does not dial in: {named(sorted(self._expected))} of this model do", True
        if self._closing.is_set():
            return "the leader is about to end", False
        if rank in self._ranks and (self._is_complete or not self._ranks[rank].wait(0.0)):
            return f"{self._ranks[rank].name} is here already", False
        if rank in self._ranks:
            self._ranks.pop(rank).close()
        return "", False


def named(ranks: Sequence[int]) -> str:
    """Ranks in a few words: "rank 3", "ranks 2-5, 9"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    words = ", ".join(f"{begin}-{end}" if end > begin else f"{begin}" for begin, end in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {words}"
