"""The orderly end of a server: nothing new is taken, what is open goes on."""

from __future__ import annotations

import contextlib
import http.client
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pageflight.loop.address import set_drain_marker

_POLL_S = 0.1
_ACTIVE = re.compile(r'^nv_trt_llm_request_metrics\{[^}]*request_type="active"[^}]*\} (\S+)$', re.MULTILINE)


@contextmanager
def refusing(server_pid: int) -> Iterator[None]:
    """For as long as the block lasts, the server's models refuse new requests with UNAVAILABLE."""
    marker = set_drain_marker(server_pid)
    try:
        yield
    finally:
        marker.unlink(missing_ok=True)


def wait_until_idle(host: str, metrics_port: int, timeout_s: float, has_ended: Callable[[], bool]) -> None:
    """Until no request is open, the server has ended, or so many seconds have passed."""
    until_s = time.monotonic() + timeout_s
    while time.monotonic() < until_s and not has_ended() and num_active(host, metrics_port):
        time.sleep(_POLL_S)


def num_active(host: str, metrics_port: int) -> int:
    """Sequences that run or wait, of all engines, as published in the last second; 0 where nobody tells."""
    connection = http.client.HTTPConnection(host, metrics_port, timeout=2)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode("utf-8", "replace")
        return int(sum(float(value) for value in _ACTIVE.findall(text)))
    return 0
