"""Ledgers of stubs, whose server is the parent of this process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pageflight.backend import answer, orphans
from pageflight.backend.answer import Reply
from pageflight.backend.ledger import Ledger, Owner, Page, pages
from pageflight.core.errors import InvalidArgument, StubLost, status_of
from pageflight.core.wire import END_REQUESTS_OF
from pageflight.loop.address import stub_folder

WORDS = (4096, 8192)


@pytest.fixture
def folder() -> Iterator[Path]:
    folder = stub_folder(os.getppid())
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def ledger(folder: Path) -> Iterator[Ledger]:
    settings: Any = SimpleNamespace(name="demo", instance=1, server_pid=os.getppid())
    made = Ledger(settings, "front")
    yield made
    made.close()


@pytest.fixture
def page(ledger: Ledger, folder: Path) -> Page:
    (found,) = pages(folder)
    return found


def test_a_ledger_says_whose_it_is(page: Page) -> None:
    owner = page.owner
    assert (owner.model, owner.instance, owner.kind, owner.stub_pid) == ("demo", 1, "front", os.getpid())
    assert owner.is_alive and page.pulse_s() is not None


def test_a_request_is_pending_then_open_then_struck_out(ledger: Ledger, page: Page) -> None:
    slot = ledger.enter(WORDS)
    assert slot is not None
    assert (page.num_requests(), page.num_pending(), page.open_requests()) == (1, 1, ())
    ledger.take_over(slot)
    assert (page.num_pending(), page.open_requests(), page.num_open()) == (0, (WORDS,), 1)
    ledger.leave(slot)
    assert (page.num_requests(), page.num_pending(), page.open_requests(), page.num_open()) == (1, 0, (), 0)
    assert ledger.enter(WORDS) == slot


def test_requests_without_a_slot_are_open_as_well(ledger: Ledger, page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the last slot, or from a sender that is not known, a request was counted once and not as open: whoever
    drained the server took it for idle."""
    monkeypatch.setattr("pageflight.backend.ledger._MAX_OPEN", 1)
    slots = [ledger.enter(WORDS), ledger.enter(WORDS), ledger.enter(None)]
    assert slots == [0, None, None] and page.num_open() == 3
    with ledger.counting(2):
        assert page.num_open() == 5
    for slot in slots:
        ledger.leave(slot)
    assert page.num_open() == 0 and ledger.enter(WORDS) == 0


@pytest.mark.parametrize(("are_open", "left"), [(True, (WORDS, (16, 32))), (False, (WORDS,))])
def test_pending_requests_are_decided_and_open_ones_stay(
    ledger: Ledger, page: Page, are_open: bool, left: tuple[tuple[int, int], ...]
) -> None:
    slot = ledger.enter(WORDS)
    assert slot is not None
    ledger.take_over(slot)
    ledger.enter((16, 32))
    page.decide(are_open=are_open)
    assert (page.num_pending(), page.open_requests(), page.num_open()) == (0, left, len(left))


def test_a_closed_ledger_is_gone(folder: Path) -> None:
    settings: Any = SimpleNamespace(name="demo", instance=0, server_pid=os.getppid())
    ledger = Ledger(settings, "preprocessing")
    (page,) = pages(folder)
    ledger.close()
    assert pages(folder) == [] and page.pulse_s() is None
    assert (page.num_requests(), page.num_pending(), page.open_requests()) == (0, 0, ())


class Request:
    """Triton's request object, which the stub program drops when it has handed the request over."""


class Sender:
    """Looks into the ledger at the moment of the final response."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.open_at_end: Any = None

    def send(self, response: object = None, flags: int = 0) -> None:
        if flags:
            self.open_at_end = (self.page.num_pending(), self.page.open_requests())


def reply_in(ledger: Ledger, page: Page, monkeypatch: pytest.MonkeyPatch) -> tuple[Reply, Sender, list[Request]]:
    monkeypatch.setattr(answer, "words_of", lambda sender: WORDS)
    sender, request = Sender(page), Request()
    reply = Reply(sender)  # type: ignore[arg-type]
    reply.keep_in(ledger, request)  # type: ignore[arg-type]
    return reply, sender, [request]


def test_a_reply_is_open_once_triton_has_dropped_the_request(
    ledger: Ledger, page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then Triton answers the client itself when the stub dies: a second answer brings it down."""
    reply, sender, requests = reply_in(ledger, page, monkeypatch)
    assert (page.num_pending(), page.open_requests()) == (1, ())
    requests.clear()
    assert (page.num_pending(), page.open_requests()) == (0, (WORDS,))
    reply.end_empty()
    assert sender.open_at_end == (0, ())


@pytest.mark.parametrize("end", [Reply.end_empty, lambda r: r.fail(StubLost("x")), lambda r: r.send_last(None)])
def test_a_reply_that_ends_first_is_struck_out_before(
    end: Any, ledger: Ledger, page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply, sender, requests = reply_in(ledger, page, monkeypatch)
    end(reply)
    assert sender.open_at_end == (0, ())
    requests.clear()
    assert (page.num_requests(), page.num_pending(), page.open_requests()) == (1, 0, ())


def test_senders_that_are_not_triton_s_are_counted_only(ledger: Ledger, page: Page) -> None:
    reply = Reply(Sender(page))  # type: ignore[arg-type]
    reply.keep_in(ledger, Request())  # type: ignore[arg-type]
    assert (page.num_requests(), page.num_pending(), page.num_open()) == (1, 0, 1)
    reply.end_empty()
    assert page.num_open() == 0


@pytest.mark.parametrize(
    "value",
    [os.getpid(), str(os.getpid()), "", True, None, "0" * 64, "\udc80"],
    ids=["a pid", "its digits", "nothing", "a flag", "null", "zeros", "no text"],  # the pid differs between processes
)
@pytest.mark.parametrize("is_alive", [True, False])
def test_nobody_without_the_secret_ends_requests(
    page: Page, value: object, is_alive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every client can send the parameter, and the number of a process that has just died can be guessed. What the
    watchdog then ended a second time could bring the server down."""
    monkeypatch.setattr(Owner, "is_alive", is_alive)
    with pytest.raises(InvalidArgument, match="no such stub") as refused:
        orphans.end_orphans({END_REQUESTS_OF: value}, object(), [])  # type: ignore[arg-type]
    assert page.path.exists() and page.owner.secret not in str(refused.value)


def test_requests_of_a_living_stub_are_its_own(page: Page) -> None:
    with pytest.raises(InvalidArgument, match="alive"):
        orphans.end_orphans({END_REQUESTS_OF: page.owner.secret}, object(), [])  # type: ignore[arg-type]
    assert page.path.exists()


def test_secrets_differ_and_lie_where_only_their_user_reads(page: Page, folder: Path) -> None:
    settings: Any = SimpleNamespace(name="demo", instance=0, server_pid=os.getppid())
    page.path.rename(page.path.with_suffix(".first"))
    other = Ledger(settings, "front")
    (found,) = pages(folder)
    other.close()
    assert len(found.owner.secret) == 64 and found.owner.secret != page.owner.secret
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_lost_stub_tells_the_client_to_try_again() -> None:
    assert status_of(StubLost("x")).triton == "UNAVAILABLE"
