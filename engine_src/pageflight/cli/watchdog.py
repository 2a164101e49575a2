"""The watchdog of `pageflight serve`: notices stubs of tritonserver that died or hang, and loads their models again.

Triton 2.51 does neither: a model whose stub has died counts as ready, refuses what comes and never answers what it had.
Stubs tell of themselves in ledgers (`backend.ledger`); a model comes back through the server's repository API.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pageflight.backend.ledger import Page, pages
from pageflight.cli.dead_stub import DeadStub, SettlePatience, how_it_ended, name_of
from pageflight.cli.errors import ServerError
from pageflight.cli.repository_api import ServerOrders
from pageflight.loop.address import stub_folder
from pageflight.loop.clock import Clock, monotonic_clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Limits, in seconds."""

    look_s: float = 0.25
    stuck_after_s: float = 10.0
    restart_stuck_after_s: float = 0.0
    """0: a stub without a sign of life is told of and left alone."""
    backoff_s: float = 1.0
    """A model that has lived for long is loaded again at once; after a short life there is this pause, and after each
    further one in a row twice the last, up to `max_backoff_s`."""
    max_backoff_s: float = 30.0
    long_life_s: float = 120.0
    unload_s: float = 10.0
    """A stub that was replaced, lives on for so long and has nothing to finish: tritonserver has forgotten it."""
    max_short_lives: int = 6
    """So many in a row, and the model is left unloaded."""
    settle: SettlePatience = field(default_factory=SettlePatience)


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """A stub that died between `alive_s`, when a look still found it alive, and `noticed_s`."""

    page: Page
    alive_s: float
    noticed_s: float


@dataclass(slots=True)
class _Record:
    """What happened to one model."""

    short_lives: int = 0
    back_s: float = float("-inf")  # when it was last loaded again
    is_recovering: bool = False
    died_again: bool = False  # meanwhile, in a stub that the recovery under way has brought
    replaced: frozenset[Path] = frozenset()  # ledgers of stubs that it does away with
    undecided: set[Path] = field(default_factory=set)  # ledgers of dead stubs whose pending requests are looked into


class Watchdog:
    """Watches the stubs of the tritonserver `server_pid` on a thread of its own, until `stop`.

    `can_reload`: the server takes orders through `api`; otherwise deaths are only told, and open requests ended. `tell`
    gets one line per event.
    """

    def __init__(
        self,
        server_pid: int,
        api: ServerOrders,
        tell: Callable[[str], None],
        *,
        can_reload: bool = True,
        patience: Patience | None = None,
        clock: Clock = monotonic_clock,
    ) -> None:
        self._folder = stub_folder(server_pid)
        self._api, self._tell_line, self._can_reload = api, tell, can_reload
        self._patience, self._clock = patience or Patience(), clock
        self._looked_s = clock()
        self._deaths: list[Death] = []
        self._known: dict[Path, Page] = {}
        self._records: dict[str, _Record] = {}
        self._stuck: set[Path] = set()
        self._dead: set[Path] = set()  # ledgers that wait to be settled
        self._forgotten: set[Path] = set()  # ledgers of stubs that the watchdog itself has ended
        self._lock = threading.Lock()  # guards the records
        self._ends_reloads, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    @property
    def deaths(self) -> Sequence[Death]:
        return tuple(self._deaths)

    @property
    def num_deaths(self) -> int:
        return len(self._deaths)

    def start(self) -> None:
        self._thread.start()

    def stop_reloads(self) -> None:
        """No model is loaded again from now on; requests of the dead still get their end."""
        self._ends_reloads.set()

    def stop(self) -> None:
        """Look away: from now on the server may end."""
        self._ends_reloads.set()
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def only_corpses_are_left(self) -> bool:
        """Whether stubs have died and no other has anything to finish: the server may not get rid of such a model."""
        return self.num_deaths > 0 and not any(page.owner.is_alive for page in pages(self._folder))

    def _tell(self, text: str) -> None:
        self._tell_line(f"watchdog: {text}")

    def _run(self) -> None:
        while not self._stopping.wait(self._patience.look_s):
            try:
                self.look()
            except Exception as error:
                self._tell(f"{type(error).__name__}: {error}; it goes on")

    def look(self) -> None:
        """One round; takes some milliseconds, because whatever takes longer goes on beside it."""
        alive_s, self._looked_s = self._looked_s, self._clock()
        was_away = self._looked_s - alive_s > 4 * self._patience.look_s + 1  # the whole machine was: nobody had a pulse
        self._dead = {path for path in self._dead if path.exists()}
        for page in pages(self._folder, skip={*self._known, *self._dead}):
            self._known[page.path] = page
        for path, page in list(self._known.items()):
            if page.owner.is_alive:
                pulse_s = page.pulse_s()
                if not was_away and pulse_s is not None:
                    self._feel(page, self._looked_s - pulse_s)
            else:
                del self._known[path]
                self._stuck.discard(path)
                if path in self._forgotten:
                    path.unlink(missing_ok=True)
                elif path.exists():  # otherwise the stub has ended as it should
                    self._dead.add(path)
                    self._died(Death(page=page, alive_s=alive_s, noticed_s=self._clock()))

    # ---- stubs that hang

    def _feel(self, page: Page, silent_s: float) -> None:
        kill_after_s = self._patience.restart_stuck_after_s
        if silent_s < min(self._patience.stuck_after_s, kill_after_s or self._patience.stuck_after_s):
            if page.path in self._stuck:
                self._stuck.remove(page.path)
                self._tell(f"{name_of(page)} is alive again")
            return
        if page.path not in self._stuck:
            self._stuck.add(page.path)
            self._tell(f"{name_of(page)} has given no sign of life for {silent_s:.0f} s")
        if 0 < kill_after_s <= silent_s:
            self._tell(f"{name_of(page)} is killed after {silent_s:.0f} s without a sign of life")
            os.kill(page.owner.stub_pid, signal.SIGKILL)

    # ---- stubs that died

    def _died(self, death: Death) -> None:
        page, model = death.page, death.page.owner.model
        record = self._records.setdefault(model, _Record())
        self._deaths.append(death)
        what = f"{how_it_ended(page)} with {len(page.open_requests()) + page.num_pending()} open requests"
        noticed = f"noticed within {death.noticed_s - death.alive_s:.2f} s"
        self._tell(f"{name_of(page)} {what}; {noticed}; deaths={self.num_deaths}")
        may_reload = self._can_reload and not self._ends_reloads.is_set()
        with self._lock:
            is_replaced = page.path in record.replaced
            begins = may_reload and not record.is_recovering and not is_replaced
            record.is_recovering = record.is_recovering or begins
            if not is_replaced:
                record.died_again = not begins
                record.undecided.add(page.path)
        self._in_background(self._settle, page, record, is_replaced)
        if begins:
            self._in_background(self._bring_back, model, record)
        elif not self._can_reload:
            self._tell(f"{model} stays as it is: this server takes no orders to load models")
        elif not may_reload:
            self._tell(f"{model} is not loaded again: the server ends")

    def _settle(self, page: Page, record: _Record, is_replaced: bool) -> None:
        dead = DeadStub(page, self._api, self._tell, self._stopping, self._patience.settle)
        try:
            dead.decide_pending(is_counted=not is_replaced)
        finally:
            record.undecided.discard(page.path)
        dead.end_requests()

    def _bring_back(self, model: str, record: _Record) -> None:
        """Unload, wait if the model keeps dying, load; again until it is there or there is no sense in it."""
        died_s, patience = time.monotonic(), self._patience
        while not self._ends_reloads.is_set():
            is_short = time.monotonic() - record.back_s < patience.long_life_s
            record.short_lives = record.short_lives + 1 if is_short else 0
            while record.undecided and not self._ends_reloads.wait(0.02):
                pass  # tritonserver forgets its counts with the model
            if self._ends_reloads.is_set():
                return
            with self._lock:
                record.replaced = frozenset(page.path for page in pages(self._folder) if page.owner.model == model)
                record.died_again = False
            self._order(self._api.unload, model)
            if record.short_lives >= patience.max_short_lives:
                times = f"{record.short_lives} times in a row, each time soon after it was loaded"
                self._tell(f"{model} died {times}; it stays unloaded until the server is started again")
                return
            if record.short_lives:
                pause_s = min(patience.backoff_s * 2 ** (record.short_lives - 1), patience.max_backoff_s)
                if self._ends_reloads.wait(pause_s):
                    return
            is_back = self._order(self._api.load, model)
            record.back_s = time.monotonic()
            if not is_back:
                continue
            self._tell(f"{model} is back after {record.back_s - died_s:.1f} s; deaths={self.num_deaths}")
            self._in_background(self._end_forgotten, record.replaced)
            with self._lock:
                record.is_recovering = record.died_again
                if not record.is_recovering:
                    return

    def _end_forgotten(self, replaced: frozenset[Path]) -> None:
        """End the healthy stubs of a model that was replaced because one of them had died: where tritonserver cannot
        get rid of the dead one it keeps them all, until its own end."""
        self._ends_reloads.wait(self._patience.unload_s)
        while not self._ends_reloads.wait(self._patience.look_s):
            left = [page for page in map(Page.of, replaced) if page is not None and page.owner.is_alive]
            if not left:
                return
            for page in left:
                if not page.num_open():
                    self._tell(f"{name_of(page)} was replaced and has nothing to do; it is ended")
                    self._forgotten.add(page.path)
                    os.kill(page.owner.stub_pid, signal.SIGKILL)

    def _order(self, order: Callable[[str], None], model: str) -> bool:
        try:
            order(model)
        except ServerError as error:
            if not self._stopping.is_set():
                self._tell(f"{order.__name__} {model}: {error}")
            return False
        return True

    def _in_background(self, work: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=work, args=arguments, name=f"watchdog-{work.__name__}", daemon=True).start()
