"""What a dead stub leaves behind: requests that Triton would never end, and how they get their end.

A living stub ends them, because only a stub can (`backend.orphans`); a request to the preprocessing model asks it to.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pageflight.backend.ledger import Page, pages
from pageflight.cli.errors import ServerError
from pageflight.cli.repository_api import ServerOrders
from pageflight.core.wire import END_REQUESTS_OF

_STEP_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class SettlePatience:
    """Limits, in seconds since the death."""

    sent_s: float = 1.0
    """By then tritonserver has passed on all that the stub had sent."""
    refused_s: float = 2.5
    """By then it has itself refused what it had not handed over to the stub."""
    decide_s: float = 4.0
    end_s: float = 60.0


class DeadStub:
    """One dead stub's requests. `decide_pending` comes first, while the model is still loaded."""

    def __init__(
        self,
        page: Page,
        api: ServerOrders,
        tell: Callable[[str], None],
        stopping: threading.Event,
        patience: SettlePatience,
    ) -> None:
        self._page, self._api, self._tell, self._stopping, self._patience = page, api, tell, stopping, patience
        self._died_s = time.monotonic()

    def decide_pending(self, *, is_counted: bool) -> None:
        """Find out which requests tritonserver ends itself. `is_counted`: it still has its count of this model."""
        num_pending = self._page.num_pending()
        if not num_pending:
            return
        are_open = self._were_handed_over() if is_counted else None
        if are_open is None:
            self._tell(f"{name_of(self._page)} leaves {num_pending} requests of unknown state; they may wait for ever")
        else:
            self._page.decide(are_open=are_open)

    def end_requests(self) -> None:
        """Have a living stub end what is open, and clear away the ledger."""
        page = self._page
        # tritonserver ends those of other stubs; of what is still pending nobody knows, and has been told.
        num_open = page.num_open() - page.num_pending() if page.owner.kind == "front" else 0
        if not num_open:
            page.path.unlink(missing_ok=True)
            return
        self._stopping.wait(max(0.0, self._died_s + self._patience.sent_s - time.monotonic()))
        reason = self._ask_others() if page.open_requests() else "their stub could not note whom it answers"
        while page.claimed.exists() and self._is_before(self._patience.end_s):
            pass
        left = [path for path in (page.path, page.claimed, page.given_up) if path.exists()]
        if left and not self._stopping.is_set():
            self._tell(f"{num_open} requests of {name_of(page)} cannot be ended and wait for ever: {reason}")
            for path in left:  # who drains the server need not wait for them
                path.unlink(missing_ok=True)

    def _ask_others(self) -> str:
        """Ask living stubs until one has claimed the ledger; what the last of them said if it did not work."""
        wish, last = {END_REQUESTS_OF: self._page.owner.secret}, "no preprocessing model is alive"
        while self._is_before(self._patience.end_s) and self._page.path.exists():
            for page in self._stubs():
                if page.owner.kind != "preprocessing" or not page.owner.is_alive:
                    continue
                try:
                    self._api.infer(page.owner.model, "QUERY", " ", wish)
                    last = "the server's log has the reason"
                    break
                except ServerError as error:
                    last = str(error)
        return last

    def _were_handed_over(self) -> bool | None:
        """Whether tritonserver leaves the pending requests to the stub, by its count of requests and those of the
        stubs of this model; None when it cannot be told."""
        num_pending, model = self._page.num_pending(), self._page.owner.model
        while self._is_before(self._patience.decide_s):
            siblings = [page for page in self._stubs() if page.owner.model == model]
            counts = [(page.num_requests(), page.num_pending()) for page in siblings]
            try:
                num_handed_over = self._api.num_successes(model)
            except ServerError:
                continue
            if counts != [(page.num_requests(), page.num_pending()) for page in siblings]:
                continue  # others go on meanwhile
            num_missing = sum(num_requests for num_requests, _ in counts) - num_handed_over
            if num_missing == 0:
                return True
            is_late = time.monotonic() - self._died_s > self._patience.refused_s
            if is_late and num_missing == num_pending == sum(pending for _, pending in counts):
                return False
        return None

    def _is_before(self, limit_s: float) -> bool:
        """After a short pause, because it stands at the head of loops."""
        return not self._stopping.wait(_STEP_S) and time.monotonic() - self._died_s < limit_s

    def _stubs(self) -> list[Page]:
        return pages(self._page.path.parent)


def name_of(page: Page) -> str:
    return f"{page.owner.model} instance {page.owner.instance} (process {page.owner.stub_pid})"


def how_it_ended(page: Page) -> str:
    """From the process' last entry, which stays until tritonserver takes note."""
    try:
        text = Path(f"/proc/{page.owner.stub_pid}/stat").read_text(encoding="ascii", errors="replace")
        status = int(text.split()[-1])
    except (OSError, ValueError):
        return "died"
    return f"died of {signal.Signals(status & 127).name}" if status & 127 else f"ended with status {status >> 8}"
