"""TCP between ranks: noticing that the other end is gone, and which of the machine's interfaces leads to it."""

from __future__ import annotations

import ipaddress
import select
import socket
from typing import Any

import psutil  # type: ignore[import-untyped]

from pageflight.core.errors import ConfigError

GONE_S = 17.0
"""A machine that vanished without a word is noticed within so many seconds."""
_IDLE_S, _INTERVAL_S, _NUM_PROBES = 5, 3, 4


def keep_alive(peer: socket.socket) -> None:
    """Have the kernel ask whether the other end is still there, and send small messages at once."""
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_S)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _INTERVAL_S)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _NUM_PROBES)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(GONE_S * 1000))  # what was sent and not received


def wait_hang_up(fd: int, timeout_s: float | None = None) -> bool:
    """Block until the other end of a socket has ended it, or the kernel has given it up; False after `timeout_s`.

    Reads nothing, so another thread may.
    """
    poller = select.poll()
    poller.register(fd, select.POLLRDHUP)
    return bool(poller.poll(None if timeout_s is None else timeout_s * 1000))


def interface_towards(host: str) -> str:
    """Name of the interface that has the address which this machine uses towards `host`. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing
            own = probe.getsockname()[0]
    except OSError as error:
        raise ConfigError(f"no way to the first rank's host {host}: {error}") from None
    is_loopback = ipaddress.ip_address(own.partition("%")[0]).is_loopback
    interfaces: dict[str, list[Any]] = psutil.net_if_addrs()
    for name, addresses in interfaces.items():
        if any(each.address == own or (is_loopback and each.address == "127.0.0.1") for each in addresses):
            return name
    raise ConfigError(f"no interface of this machine has {own}, its address towards the first rank's host {host}")
