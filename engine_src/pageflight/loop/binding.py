"""Binding a zmq socket where another process may still have, or later take, the same place."""

from __future__ import annotations

import os
from pathlib import Path

import zmq


def bind_over(socket: zmq.Socket[bytes], address: str) -> None:
    """Bind to the ipc `address`, taking it over from whoever has it.

    When a socket closes, zmq removes the file that it has bound, even if another process' stands there by then: a core
    that ends after its successor has begun would cut that off. So the file is bound under a name of its own and moved.
    """
    place = Path(address.removeprefix("ipc://"))
    own = place.with_name(f"{os.getpid()}{place.name[0]}")  # no longer than the longest name: see `CoreAddress`
    socket.bind(f"ipc://{own}")
    os.replace(own, place)
