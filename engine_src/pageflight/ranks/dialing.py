"""How a rank reaches the leader."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from multiprocessing.connection import Connection

from pageflight import __version__
from pageflight.core.errors import ConfigError
from pageflight.ranks.handshake import LIMIT_S, NotARank, RankRefused, join
from pageflight.ranks.network import keep_alive, wait_hang_up

log = logging.getLogger(__name__)

GRACE_S = 3.0
"""What a rank has to end by itself when its line has."""
ENDED, FAILED, NO_LEADER, REFUSED = 0, 1, os.EX_TEMPFAIL, os.EX_NOPERM
"""How a rank exits: its line has ended, it has failed and said so, nobody took it in time, and nobody ever will."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 1.0


class NoLeader(Exception):
    """Nobody who takes this rank was there in time."""


def parse_leader(text: str, default_port: int) -> tuple[str, int]:
    """Host and port of "HOST", "HOST:PORT" or "[ADDRESS]:PORT". Raises ConfigError."""
    host, colon, port = text.rpartition(":")
    if not colon or (host.count(":") and not host.endswith("]")):
        host, port = text, str(default_port)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"leader={text!r}: must be HOST or HOST:PORT, with a port from 1 to 65535")
    return host, int(port)


def dial(leader: tuple[str, int], rank: int, key: bytes, *, wait_s: float) -> Connection:
    """The line to a leader, tried again until `wait_s` are over. Raises NoLeader, and RankRefused where it is final."""
    deadline_s, pause_s, told = time.monotonic() + wait_s, _FIRST_PAUSE_S, ""
    while True:
        try:
            return _dial_once(leader, rank, key)
        except RankRefused as error:
            if error.is_final:
                raise
            why = str(error)
        except (OSError, NotARank) as error:
            why = getattr(error, "strerror", None) or str(error)
        if time.monotonic() + pause_s > deadline_s:
            raise NoLeader(f"no leader of this rank at {leader[0]}:{leader[1]} for {wait_s:g} s: {why}")
        if why != told:
            log.info("rank %d waits for the leader at %s:%d: %s", rank, *leader, why)
            told = why
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _dial_once(leader: tuple[str, int], rank: int, key: bytes) -> Connection:
    with socket.create_connection(leader, timeout=LIMIT_S) as peer:
        keep_alive(peer)
        return join(peer, key, rank=rank, host=socket.gethostname(), version=__version__)


def end_with(line: Connection) -> None:
    """End this process soon after its line has, even while it waits for a sum that never comes."""

    def watch(fd: int) -> None:
        wait_hang_up(fd)
        time.sleep(GRACE_S)
        os._exit(0)

    threading.Thread(target=watch, args=(os.dup(line.fileno()),), name="line-watch", daemon=True).start()
