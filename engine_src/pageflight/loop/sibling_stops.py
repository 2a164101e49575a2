"""A `stop` by request id, told to every instance of a model."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import zmq

from pageflight.loop.binding import bind_over

log = logging.getLogger(__name__)

SIBLING_TIMEOUT_MS = 1000
"""An instance that has not answered by then has none of the requests."""
_END = "inproc://end"


class SiblingStops:
    """Cancels by request id whichever instance of a model has the request: Triton hands a `stop` to any of them.

    `folders`: of the instances, each with a private directory; a socket in it answers the others on a thread.
    """

    def __init__(self, folders: Sequence[Path], own: int, cancel: Callable[[str], bool]) -> None:
        """`cancel` ends the requests of this instance with an id and says whether there were any; any thread."""
        self._cancel = cancel
        self._sockets = [folder / "stops" for folder in folders]
        self._own = self._sockets[own]
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._server = self._context.socket(zmq.REP)
        bind_over(self._server, f"ipc://{self._own}")
        self._server.bind(_END)  # by the path a model that was loaded again would be ended instead
        self._thread = threading.Thread(target=self._run, name="sibling-stops", daemon=True)
        self._thread.start()

    def cancel(self, request_id: str) -> bool:
        """Cancel the open requests with this id, of all instances; whether there were any. The id is not empty."""
        siblings = [socket for socket in self._sockets if socket != self._own and socket.exists()]
        found = [self._cancel(request_id), *(self._ask(f"ipc://{socket}", request_id) for socket in siblings)]
        return any(found)

    def close(self) -> None:
        self._ask(_END, "")
        self._thread.join()
        self._context.destroy(linger=0)

    def _ask(self, address: str, request_id: str) -> bool:
        with self._context.socket(zmq.REQ) as socket:
            socket.linger = 0
            socket.connect(address)
            socket.send(request_id.encode("utf-8", "surrogateescape"))
            if socket.poll(SIBLING_TIMEOUT_MS):
                return bool(socket.recv())
        log.warning("an instance did not answer whether it has the request to stop")
        return False

    def _run(self) -> None:
        """An empty id is this instance's own, to end."""
        while True:
            request_id = self._server.recv().decode("utf-8", "surrogateescape")
            found = False
            if request_id:
                try:
                    found = self._cancel(request_id)
                except Exception:
                    log.exception("request %r could not be cancelled", request_id)
            self._server.send(b"1" if found else b"")
            if not request_id:
                return
