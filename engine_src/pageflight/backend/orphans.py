"""Ends the requests that a dead stub had open, through the sender of another request in a living one."""

from __future__ import annotations

import hmac
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pageflight.backend import triton
from pageflight.backend.ledger import Page, pages
from pageflight.backend.sender_memory import ServerMemory, has_ended_once, image_of, is_fresh, lent
from pageflight.core import wire
from pageflight.core.errors import InvalidArgument, PageflightError, StubLost, Unsupported
from pageflight.loop.address import process_start, stub_folder

log = logging.getLogger(__name__)

_SECRET = "(secret)"  # what errors show of it


def end_orphans(
    parameters: Mapping[str, object], request: triton.TritonRequest, answer: list[triton.TritonTensor]
) -> bool:
    """Do what `wire.END_REQUESTS_OF` among a request's parameters asks for; whether it did, and sent `answer` itself.

    The request's own sender shows with its own end how this Triton keeps senders; only then it is used for others.
    Where it cannot be done the ledger is `given_up`. Raises InvalidArgument when the parameter is not the secret of a
    dead stub of this server, Unsupported when nothing was sent because this Triton is not known.
    """
    if wire.END_REQUESTS_OF not in parameters:
        return False
    page = _named(parameters[wire.END_REQUESTS_OF])
    sender, memory = request.get_response_sender(), ServerMemory(page.owner.server_pid)
    with _claimed(page) as claimed:
        before = image_of(sender)
        if before is None or not is_fresh(before, memory):
            raise Unsupported(wire.END_REQUESTS_OF, _SECRET, "this Triton keeps its requests in an unknown way")
        sender.send(triton.response(answer), flags=triton.FINAL)
        if not has_ended_once(before, image_of(sender)):
            log.error("requests of a dead stub cannot be ended: this Triton keeps its requests in an unknown way")
            claimed.path.rename(page.given_up)
            return True
        orphans = claimed.open_requests()
        for words in orphans:
            try:
                if not memory.holds(words):
                    raise ValueError("tritonserver cannot have it")
                with lent(sender, words):
                    sender.send(triton.error_response(_error(page)), flags=triton.FINAL)
            except Exception:
                log.exception("a request of the dead stub of %s could not be ended", page.owner.model)
        log.warning("ended %d requests of the dead stub %d of %s", len(orphans), page.owner.stub_pid, page.owner.model)
    return True


def _named(secret: object) -> Page:
    """The ledger of the dead stub whose secret this is: only who reads the server's private folder knows it."""
    server_pid, given = os.getppid(), str(secret).encode("utf-8", "replace")
    found = [page for page in pages(stub_folder(server_pid)) if hmac.compare_digest(page.owner.secret.encode(), given)]
    if not found or found[0].owner.server_start != process_start(server_pid):
        raise InvalidArgument(wire.END_REQUESTS_OF, _SECRET, "this server has no such stub with open requests")
    if found[0].owner.is_alive:
        raise InvalidArgument(wire.END_REQUESTS_OF, _SECRET, "this stub is alive and ends its requests itself")
    return found[0]


@contextmanager
def _claimed(page: Page) -> Iterator[Page]:
    """The ledger where no other instance finds it; in the end it is removed, or given up after an error."""
    try:
        page.path.rename(page.claimed)
    except FileNotFoundError:
        raise InvalidArgument(wire.END_REQUESTS_OF, _SECRET, "its requests are being ended already") from None
    try:
        yield Page(page.claimed, page.owner)
    except BaseException:
        page.claimed.rename(page.given_up)
        raise
    page.claimed.unlink(missing_ok=True)


def _error(page: Page) -> PageflightError:
    return StubLost(f"the process of {page.owner.model} that had this request died; send it again")
