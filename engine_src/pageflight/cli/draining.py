"""The orderly end of a server: nothing new is taken, what is open goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pageflight.backend.ledger import Page, paths
from pageflight.loop.address import process_start, set_drain_marker, stub_folder

_POLL_S = 0.1


@contextmanager
def refusing(server_pid: int) -> Iterator[None]:
    """For as long as the block lasts, the server's models refuse new requests with UNAVAILABLE."""
    marker = set_drain_marker(server_pid)
    try:
        yield
    finally:
        marker.unlink(missing_ok=True)


def wait_until_idle(server_pid: int, timeout_s: float, has_ended: Callable[[], bool]) -> None:
    """Until it is known that no request is open, the server has ended, or so many seconds have passed."""
    until_s = time.monotonic() + timeout_s
    while time.monotonic() < until_s and not has_ended() and num_open(server_pid) != 0:
        time.sleep(_POLL_S)


def num_open(server_pid: int) -> int | None:
    """Requests that the server's stubs have open, by their own ledgers; None when they do not tell.

    Exact while new requests are refused: a stub counts a request before it looks whether to take it. A stub that has
    died has its requests open until somebody ends them.
    """
    found = paths(stub_folder(server_pid))
    if not found and _has_children(server_pid):
        return None
    total = 0
    for path in found:
        page = Page.of(path)
        if page is not None:
            total += page.num_open()
        elif path.exists():  # of a version that this one cannot read
            return None
    return total


def _has_children(pid: int, proc: Path = Path("/proc")) -> bool:
    """Whether the process has living ones: a server without models has no stubs and no ledgers."""
    for path in proc.glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and process_start(int(path.parent.name)) is not None:
            return True
    return False
