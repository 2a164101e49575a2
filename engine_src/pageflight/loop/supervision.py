"""What a front learns of the supervisor of its core: whether another core is to come, and how often one has."""

from __future__ import annotations

import time

from pageflight.core.errors import EngineLost, PageflightError
from pageflight.loop.address import CoreAddress
from pageflight.loop.status import read_status

_NO_SUPERVISOR_LIMIT_S = 30.0
"""A new stub of the engine model needs some seconds to start, more on a busy machine."""


class Supervision:
    """Of the cores at one address, read off the supervisor's file."""

    def __init__(self, address: CoreAddress) -> None:
        self._address = address
        self._num_restarts = 0

    def loss(self, waiting_since_s: float | None) -> PageflightError | None:
        """Why no core will come; None while one may. `waiting_since_s`: since when there is none, if there was one."""
        status = read_status(self._address.status)
        if status is None or not status.is_current:
            # A front may come up before its supervisor; and one that had a core waits a moment for a new supervisor.
            if waiting_since_s is not None and time.monotonic() - waiting_since_s > _NO_SUPERVISOR_LIMIT_S:
                return EngineLost("the engine core and its supervisor are gone")
        elif status.state in ("lost", "closed"):
            return status.failure or EngineLost("the engine core was closed")
        return None

    def new_restarts(self) -> int:
        """Restarts since the last call."""
        status = read_status(self._address.status)
        before = self._num_restarts
        self._num_restarts = status.restarts if status is not None else before
        return max(0, self._num_restarts - before)

    def describe(self) -> str:
        """What the supervisor is about, for whoever waits in vain."""
        status = read_status(self._address.status)
        return "there is no supervisor" if status is None else f"it is {status.state} {status.progress}".rstrip()
