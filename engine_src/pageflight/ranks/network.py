"""TCP between ranks: noticing that the other end is gone, and which of the machine's interfaces leads to it."""

from __future__ import annotations

import ipaddress
import os
import select
import socket
from typing import Any

import psutil  # type: ignore[import-untyped]

from pageflight.core.errors import ConfigError

GONE = "PAGEFLIGHT_RANK_GONE_S"
"""Variable of the environment: seconds within which a machine that vanished without a word is noticed."""
GONE_S = 18


def keep_alive(peer: socket.socket) -> None:
    """Have the kernel ask whether the other end is still there, and send small messages at once."""
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    limit_s = gone_s()
    interval_s = max(1, limit_s // 6)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval_s)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval_s)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, max(1, limit_s // interval_s - 1))
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit_s * 1000)  # of what was sent and not received


def gone_s() -> int:
    """Raises ConfigError for a setting that cannot work."""
    text = os.environ.get(GONE) or str(GONE_S)
    if not text.isdigit() or not 2 <= int(text) <= 3600:
        raise ConfigError(f"{GONE}={text!r}: must be a whole number of seconds from 2 to 3600")
    return int(text)


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
