"""The other ranks, as the first one sees them: told, listened to, watched, wherever they are."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from pageflight.core.errors import STATUS, PageflightError, RankLost
from pageflight.models.stages import Place
from pageflight.ranks.launcher import Ended, Launcher, RankHandle
from pageflight.ranks.messages import Computed, Failed, FromRank, RankSpec, decode_from_rank, encode

log = logging.getLogger(__name__)

GRACE_S = 1.0
"""What the first rank has to find out by itself that another died: the sum that it waits for fails, if it does."""
SETTLE_S = 0.4
"""Less than that: for the news of a rank that was killed, where another has failed, perhaps because of it."""
PRESENT_S = 120.0
"""What a rank has, from being told what to load, to import torch and to look at its engine and its device."""
MEET_S = 120.0
"""What all ranks have to meet, when all are there."""
CLOSE_S = 5.0
_TYPED = {cls.__name__: cls for cls in STATUS if cls.__init__ is PageflightError.__init__}
"""Errors that are their message."""

OnLoss = Callable[[PageflightError], None]


class RankProcesses:
    """Every rank but the first, started by a launcher.

    `on_loss` is called by another thread when one has died and nobody has asked `loss` for `GRACE_S`: the first rank
    may be waiting for it for ever, or have nothing to do.
    """

    def __init__(self, launcher: Launcher, places: Sequence[Place], on_loss: OnLoss | None = None) -> None:
        """Starts them. Raises what the launcher does."""
        self._launcher, self._on_loss = launcher, on_loss
        self._closing = threading.Event()
        self._lost = threading.Event()
        self._told = threading.Event()
        self._loss: PageflightError | None = None
        self._reasons: list[PageflightError] = []
        self._changed = threading.Condition()
        self._reading = threading.Lock()
        self._last_words: dict[int, Failed] = {}
        try:
            self._ranks = tuple(launcher.start(places))
        except BaseException:
            launcher.close()
            raise
        self._watchers = [
            threading.Thread(target=self._watch, args=(each,), name=f"rank-{each.rank}", daemon=True)
            for each in self._ranks
        ]
        for watcher in self._watchers:
            watcher.start()

    def tell(self, specs: Sequence[RankSpec]) -> None:
        """Give each rank its task."""
        for spec, each in zip(specs, self._ranks, strict=True):
            with suppress(OSError):  # it has ended: `wait_present` says why
                each.line.send_bytes(encode(spec))

    def wait_present(self) -> None:
        """Block until every process has come up, for `PRESENT_S`. Raises what keeps one from it."""
        deadline_s = time.monotonic() + PRESENT_S
        for each in self._ranks:
            with suppress(EOFError, OSError):
                if not each.line.poll(max(0.0, deadline_s - time.monotonic())):
                    raise _hung(f"{each.name} has not said within {PRESENT_S:g} s that it is there")
                message = decode_from_rank(each.line.recv_bytes())
                if not isinstance(message, Failed):
                    continue
                self._last_words[each.rank] = message
            raise self._gone(each)

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Around what waits for all ranks that are present. Where that takes more than `MEET_S` one of them hangs: they
        are killed, and `on_loss` is called, for what waits cannot be reached."""
        over = threading.Event()

        def watch() -> None:
            if over.wait(MEET_S) or self._closing.is_set():
                return
            self._lose(_hung(f"the ranks have not met within {MEET_S:g} s, though all were there: one of them hangs"))
            for each in self._ranks:
                each.kill()

        watcher = threading.Thread(target=watch, name="rank-meeting", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()

    def send(self, message: bytes) -> None:
        """To every rank. Raises the loss of one."""
        for each in self._ranks:
            try:
                each.line.send_bytes(message)
            except OSError:
                raise self._gone(each) from None

    def computed(self) -> Iterator[tuple[int, Computed]]:
        """What ranks have said since the last call of the steps that they computed."""
        with self._reading:
            for each in self._ranks:
                for message in self._read(each):
                    if isinstance(message, Computed):
                        yield each.rank, message

    def loss(self, wait_s: float = 0.0) -> PageflightError | None:
        """Why the model is not whole any more; waits so long for the news. Who asks makes an end of it."""
        self._lost.wait(wait_s)
        if self._loss is not None:
            self._told.set()
        return self._loss

    def dismiss(self, *, at_once: bool) -> None:
        """Tell all processes to end. `at_once`: they may be waiting for a sum that never comes, and are killed."""
        self._closing.set()
        self._told.set()
        for each in self._ranks:
            if at_once:
                each.kill()
            each.hang_up()

    def close(self) -> None:
        """Wait for the processes that were dismissed, but not for long."""
        deadline_s = time.monotonic() + CLOSE_S
        for each in self._ranks:
            if each.wait(max(0.0, deadline_s - time.monotonic())) is None:
                each.kill()
                each.wait()
        for watcher in self._watchers:
            watcher.join()
        self._launcher.close()

    def _gone(self, each: RankHandle) -> PageflightError:
        """Why a rank's line has ended."""
        return self.loss(wait_s=GRACE_S) or self._reason(each, Ended(words="its line ended", return_code=None))

    def _read(self, each: RankHandle) -> Iterator[FromRank]:
        with suppress(EOFError, OSError):  # it has ended; who watches it says why
            while each.line.poll():
                message = decode_from_rank(each.line.recv_bytes())
                if isinstance(message, Failed):
                    self._last_words[each.rank] = message
                yield message

    def _watch(self, each: RankHandle) -> None:
        ended = each.wait()
        assert ended is not None, "there was no time limit"
        if self._closing.is_set():
            return
        with self._reading:
            for other in self._ranks:
                list(self._read(other))
            reason = self._reason(each, ended)
        with self._changed:
            self._reasons.append(reason)
            self._changed.notify_all()
            if not _comes_first(reason):  # a sum fails, or NCCL aborts, where another rank is lost
                self._changed.wait_for(lambda: any(map(_comes_first, self._reasons)), SETTLE_S)
                reason = next(filter(_comes_first, self._reasons), reason)
        self._lose(reason)

    def _lose(self, reason: PageflightError) -> None:
        with self._changed:
            self._loss = loss = self._loss or reason
            self._lost.set()
        log.error("%s", loss)
        if not self._told.wait(GRACE_S) and self._on_loss is not None:
            self._on_loss(loss)

    def _reason(self, each: RankHandle, ended: Ended) -> PageflightError:
        words = self._last_words.get(each.rank)
        if words is not None and words.error in _TYPED:
            is_named = each.name in words.message
            return _TYPED[words.error](words.message if is_named else f"{each.name}: {words.message}")
        if words is not None:
            return RankLost(f"{each.name} failed: {words.error}: {words.message}")
        return RankLost(f"{each.name} died ({ended.words})", return_code=ended.return_code)


def _comes_first(reason: PageflightError) -> bool:
    """Whether it is no consequence of another rank's end: an error that says what is wrong, or somebody killed it."""
    return not isinstance(reason, RankLost) or reason.return_code == -signal.SIGKILL


def _hung(words: str) -> RankLost:
    """Of a rank that starts: no stream's doing."""
    return RankLost(words, return_code=-signal.SIGKILL)
