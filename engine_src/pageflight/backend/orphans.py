"""Ends the requests that a dead stub had open, through the sender of another request in a living one."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from pageflight.backend import triton
from pageflight.backend.ledger import Page
from pageflight.backend.sender_memory import ServerMemory, is_known, lent
from pageflight.core import wire
from pageflight.core.errors import InvalidArgument, PageflightError, StubLost, Unsupported
from pageflight.loop.address import process_start, stub_folder

log = logging.getLogger(__name__)


def end_orphans(parameters: Mapping[str, object], request: triton.TritonRequest) -> None:
    """Do what `wire.END_REQUESTS_OF` among a request's parameters asks for, if it does.

    Its value is the process id of a stub of this server that has died. Once is enough: its ledger is removed.
    Raises InvalidArgument when there is no such stub, Unsupported when this Triton is not known well enough.
    """
    if wire.END_REQUESTS_OF not in parameters:
        return
    value = parameters[wire.END_REQUESTS_OF]
    page = _claim(value)
    try:
        sender, memory = request.get_response_sender(), ServerMemory(page.owner.server_pid)
        if not is_known(sender, memory):
            raise Unsupported(wire.END_REQUESTS_OF, value, "this Triton keeps its requests in an unknown way")
        orphans = page.open_requests()
        for words in orphans:
            try:
                if not memory.holds(words):
                    raise ValueError("tritonserver cannot have it")
                with lent(sender, words):
                    sender.send(triton.error_response(_error(page)), flags=triton.FINAL)
            except Exception:
                log.exception("a request of the dead stub of %s could not be ended", page.owner.model)
        log.warning("ended %d requests of the dead stub %d of %s", len(orphans), page.owner.stub_pid, page.owner.model)
    finally:
        page.path.unlink()


def _claim(value: object) -> Page:
    """The ledger of the dead stub, which no other instance can claim any more."""
    server_pid = os.getppid()
    path = stub_folder(server_pid) / str(value)
    page = Page.of(path) if isinstance(value, int) else None
    if page is None or page.owner.server_pid != server_pid or page.owner.server_start != process_start(server_pid):
        raise InvalidArgument(wire.END_REQUESTS_OF, value, "this server has no such stub with open requests")
    if page.owner.is_alive:
        raise InvalidArgument(wire.END_REQUESTS_OF, value, "this stub is alive and ends its requests itself")
    claimed = path.with_suffix(".claimed")
    try:
        path.rename(claimed)
    except FileNotFoundError:
        raise InvalidArgument(wire.END_REQUESTS_OF, value, "its requests are being ended already") from None
    return Page(claimed, page.owner)


def _error(page: Page) -> PageflightError:
    return StubLost(f"the process of {page.owner.model} that had this request died; send it again")
