"""Keeps one core process running: starts it, waits for it, watches it, starts it again when it dies or hangs."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pageflight.core.errors import (
    CheckpointError,
    ConfigError,
    EngineLost,
    ManifestMismatch,
    OutOfMemory,
    PageflightError,
    RanksMissing,
)
from pageflight.loop.address import CoreAddress
from pageflight.loop.deaths import MAX_KEPT, Death, is_crash, write_deaths
from pageflight.loop.devices import on_cores
from pageflight.loop.reports import DRAIN_SIGNAL, SHRUNK_TO, CacheSize, Report, parse_reports
from pageflight.loop.status import CoreStatus, write_status
from pageflight.loop.step_trace import read_trace

log = logging.getLogger(__name__)

LEAST_SHARE = 0.5
"""Of its first blocks that a cache keeps however often memory does not suffice: then something else takes it."""
_PERMANENT = frozenset(cls.__name__ for cls in (ManifestMismatch, CheckpointError, ConfigError, RanksMissing))
"""Errors that another try cannot mend, unless the same engine has been ready before."""
_WAITED = RanksMissing.__name__
"""Of a start that has waited for others as long as clients are to wait. They are told, and it is tried on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorConfig:
    """Limits of patience, in seconds."""

    start_timeout_s: float = 600.0
    hang_limit_s: float = 60.0
    """A ready core that gives no sign of life for so long is killed and started again."""
    max_failed_starts: int = 4
    """So many starts in a row that failed before they were ready, and the core is given up."""
    max_killed_starts: int = 20
    """The same for starts that somebody killed, and for those that lacked what an earlier one had, such as memory."""
    max_useless_lives: int = 8
    """So many cores in a row that were ready and completed not one step, and the engine is given up: it is broken."""
    backoff_s: float = 0.1
    """A core that lived for long, or completed a step, is started again at once; after a second useless life in a row
    there is this pause, and after each further one twice the last, up to `max_backoff_s`."""
    max_backoff_s: float = 2.0
    long_life_s: float = 10.0


class Supervisor:
    """Owner of one core process. A thread of its own starts and watches it: the kernel ties a child's life to the
    *thread* that started it, so that thread must live as long as the supervisor."""

    def __init__(
        self,
        command: Callable[[int, int, CacheSize | None], Sequence[str]],
        address: CoreAddress,
        *,
        environment: dict[str, str] | None = None,
        cores: frozenset[int] | None = None,
        config: SupervisorConfig | None = None,
    ) -> None:
        """`command(report_fd, trace_fd, cache)`: the core's command line with its end of the pipe and its memory file.

        `cache` is the size of the first core's cache; None for the first. Made from the memory that is free at each
        start it could be less, and sequences that one core had accepted would not fit the next. It is less after a core
        has ended for want of memory: those that do not fit are refused then. `cores`: of the processor, that each
        process is kept on; None: all of this one's.
        """
        self._command, self._address, self._environment, self._cores = command, address, environment, cores
        self._config = config or SupervisorConfig()
        self._changed = threading.Condition()
        self._status = CoreStatus(state="starting", supervisor_pid=os.getpid())
        self._process: subprocess.Popen[bytes] | None = None
        self._trace_fd = -1
        self._cache: CacheSize | None = None
        self._num_first_blocks = 0
        self._deaths: list[Death] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="core-supervisor", daemon=True)

    @property
    def status(self) -> CoreStatus:
        return self._status

    def start(self) -> None:
        """Create the meeting place and begin to start the core; returns at once."""
        self._address.create()
        write_status(self._address.status, self._status)
        self._thread.start()

    def wait_ready(self, timeout_s: float) -> None:
        """Block until the core is ready. Raises the error that kept it from starting, or EngineLost."""
        with self._changed:
            settled = self._changed.wait_for(lambda: self._status.state in ("ready", "lost", "closed"), timeout_s)
            status = self._status
        if status.state == "ready":
            return
        if not settled:
            raise EngineLost(f"the engine core is not ready after {timeout_s:.0f} s; last heard: {status.progress!r}")
        raise status.failure or EngineLost("the engine core was closed while it started")

    def close(self, drain_timeout_s: float) -> None:
        """Let the core finish its open sequences for so long, then end it."""
        self._closing.set()
        process = self._process
        if process is not None:
            process.send_signal(DRAIN_SIGNAL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(drain_timeout_s)
            if process.poll() is None:
                process.kill()
        if self._thread.is_alive():
            self._thread.join()
        self._set(state="closed")
        self._address.remove()

    def _run(self) -> None:
        try:
            with contextlib.ExitStack() as stack:
                self._trace_fd = os.memfd_create("pageflight-step")
                stack.callback(os.close, self._trace_fd)
                self._keep_alive()
        except Exception as error:  # the core goes with this thread: whoever waits for it must learn that
            log.exception("the supervisor failed")
            self._set(state="lost", error=EngineLost.__name__, message=f"its supervisor failed: {error}", core_pid=0)

    def _keep_alive(self) -> None:
        patience = _Patience(self._config)
        while not self._closing.is_set():
            life = self._live()
            if self._closing.is_set():
                break
            log.error("engine core ended: %s: %s", life.failure.error, life.failure.message)
            pause_s = patience.after(life)
            error, message = life.failure.error, life.failure.message
            if patience.has_been_ready:  # what clients are told: their requests were valid, whatever the core lacks
                error = EngineLost.__name__
                message = message if life.was_ready else f"the engine core does not start again: {message}"
            if pause_s is None:
                return self._set(state="lost", error=error, message=message, core_pid=0)
            state = "starting" if self._status.state == "starting" else "restarting"
            if life.failure.error == _WAITED:
                state = "lost"  # until the next core, for which nobody waits
            restarts = self._status.restarts + 1
            self._set(state=state, restarts=restarts, error=error, message=message, core_pid=0)
            self._closing.wait(pause_s)

    def _live(self) -> _Life:
        """One life of a core, from its start to its end."""
        os.ftruncate(self._trace_fd, 0)
        born_s = time.monotonic()
        reader, writer = os.pipe()
        try:
            try:
                with on_cores(self._cores):
                    process = subprocess.Popen(
                        self._command(writer, self._trace_fd, self._cache),
                        pass_fds=(writer, self._trace_fd),
                        stdin=subprocess.DEVNULL,
                        env=self._environment,
                    )
            except OSError as error:
                return _Life(failure=_failure(ConfigError, f"cannot start the core: {error}"))
            finally:
                os.close(writer)
            self._process = process
            if self._closing.is_set():
                process.send_signal(DRAIN_SIGNAL)
            was_ready, failure = self._watch(process, reader)
            code = process.wait()
        finally:
            os.close(reader)
        of_itself = failure.of_itself if failure is not None else is_crash(code)
        if failure is None:
            how = f"signal {-code}" if code < 0 else f"exit status {code}"
            failure = _failure(EngineLost, f"the engine core died ({how})")
        last_words = read_trace(self._trace_fd)
        is_mended = failure.error == OutOfMemory.__name__ and self._shrink()
        if last_words is not None and not is_mended:  # the step was too large for the device, not its sequences' fault
            self._keep(Death(epoch=last_words.epoch, handles=last_words.handles, of_itself=of_itself))
        return _Life(
            failure=failure,
            was_ready=was_ready,
            of_itself=of_itself,
            num_steps=last_words.steps if last_words is not None else 0,
            was_in_step=last_words is not None and bool(last_words.handles),
            is_mended=is_mended,
            seconds=time.monotonic() - born_s,
        )

    def _shrink(self) -> bool:
        """Give the next core a smaller cache; False where none was ready, or this has been done often enough."""
        cache = self._cache
        if cache is None or cache.num_blocks * SHRUNK_TO < self._num_first_blocks * LEAST_SHARE:
            return False
        self._cache = cache.shrunk()
        log.warning(
            "the engine core ran out of memory: the next has %d blocks, not %d, for sequences of up to %d tokens",
            self._cache.num_blocks,
            cache.num_blocks,
            self._cache.max_sequence_len,
        )
        self._set(shrinks=self._status.shrinks + 1, num_blocks=self._cache.num_blocks)
        return True

    def _keep(self, death: Death) -> None:
        self._deaths = [*self._deaths, death][-MAX_KEPT:]
        try:
            write_deaths(self._address.deaths, self._deaths)
        except OSError:
            log.exception("how the core died could not be written; no sequence is suspected")

    def _watch(self, process: subprocess.Popen[bytes], reader: int) -> tuple[bool, Report | None]:
        """Follow the core's reports until its end of the pipe closes, which it does when the process dies.

        Returns whether it became ready, and what it died of where that is known.
        """
        buffer, ready, failure = bytearray(), False, None
        poller = select.poll()
        poller.register(reader, select.POLLIN)
        deadline_s = time.monotonic() + self._config.start_timeout_s
        while True:
            # Whoever was stopped beside its core finds the time over and the signs of life in the pipe.
            left_s = max(0.0, deadline_s - time.monotonic())
            if not poller.poll(left_s * 1000):
                if self._closing.is_set():
                    deadline_s = time.monotonic() + self._config.start_timeout_s  # close() has its own limit
                    continue
                what = "gave no sign of life" if ready else "was not ready"
                limit_s = self._config.hang_limit_s if ready else self._config.start_timeout_s
                process.kill()
                return ready, _failure(EngineLost, f"the engine core {what} for {limit_s:g} s")
            data = os.read(reader, 65536)
            if not data:
                return ready, failure
            buffer += data
            for report in parse_reports(buffer):
                if report.kind == "ready":
                    ready = True
                    self._learn(report.cache)
                    self._set(state="ready", core_pid=process.pid, error="", message="", progress="")
                elif report.kind == "progress":
                    self._set(progress=report.message, core_pid=process.pid)
                elif report.kind == "failed":
                    failure = report
            if ready:
                deadline_s = time.monotonic() + self._config.hang_limit_s

    def _learn(self, cache: CacheSize | None) -> None:
        """The size that a core could allocate: the first one's, or less than it was told to."""
        if cache is not None and (self._cache is None or cache.num_blocks < self._cache.num_blocks):
            self._num_first_blocks = self._num_first_blocks or cache.num_blocks
            self._cache = cache
            self._set(num_blocks=cache.num_blocks)

    def _set(self, **changes: object) -> None:
        with self._changed:
            values = {name: getattr(self._status, name) for name in CoreStatus.__struct_fields__}
            self._status = CoreStatus(**{**values, **changes})
            if self._address.folder.is_dir():
                try:
                    write_status(self._address.status, self._status)
                except OSError:  # a full disk is no reason to let the core go
                    log.exception("the state of the core could not be written; fronts know the one before")
            self._changed.notify_all()


def _failure(error: type[PageflightError], message: str) -> Report:
    return Report("failed", message, error.__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Life:
    """How a core lived and what ended it."""

    failure: Report
    was_ready: bool = False
    of_itself: bool = True
    was_in_step: bool = False
    is_mended: bool = False  # the next core lacks what ended this one
    num_steps: int = 0
    seconds: float = 0.0


class _Patience:
    """How often, and how soon, a core is started again."""

    def __init__(self, config: SupervisorConfig) -> None:
        self._config = config
        self.has_been_ready = False
        self._failed_starts = self._patient_starts = self._useless_lives = self._short_lives = 0

    def after(self, life: _Life) -> float | None:
        """Seconds to wait before the next start; None: there is none."""
        config = self._config
        is_setting = life.failure.error in _PERMANENT
        if life.was_ready:
            self.has_been_ready = True
            self._failed_starts = self._patient_starts = 0
        elif life.of_itself and not (is_setting and self.has_been_ready):
            self._failed_starts += 1
        elif life.failure.error != _WAITED:
            self._patient_starts += 1
        if life.num_steps:
            self._useless_lives = 0
        elif not life.is_mended:
            self._useless_lives += life.was_ready and (life.of_itself or life.was_in_step)
        if (
            (is_setting and not self.has_been_ready)
            or self._failed_starts >= config.max_failed_starts
            or self._patient_starts >= config.max_killed_starts
            or self._useless_lives >= config.max_useless_lives
        ):
            return None
        self._short_lives = 0 if life.num_steps or life.seconds >= config.long_life_s else self._short_lives + 1
        if self._short_lives <= 1:
            return 0.0
        pause_s: float = config.backoff_s * 2 ** (self._short_lives - 2)
        return min(pause_s, config.max_backoff_s)
