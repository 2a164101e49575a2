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

from pageflight.core.errors import CheckpointError, ConfigError, EngineLost, ManifestMismatch
from pageflight.loop.address import CoreAddress
from pageflight.loop.reports import Report, parse_reports
from pageflight.loop.status import CoreStatus, write_status

log = logging.getLogger(__name__)

_PERMANENT = frozenset(cls.__name__ for cls in (ManifestMismatch, CheckpointError, ConfigError))
"""Errors that another try cannot mend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorConfig:
    """Limits of patience, in seconds."""

    start_timeout_s: float = 600.0
    hang_limit_s: float = 60.0
    """A ready core that gives no sign of life for so long is killed and started again."""
    max_failed_starts: int = 4
    """So many starts in a row that never became ready, and the core is given up."""
    backoff_s: float = 0.1
    """A core that lived for long is started again at once; after a second short life in a row there is this pause, and
    after each further one twice the last, up to `max_backoff_s`."""
    max_backoff_s: float = 2.0
    long_life_s: float = 10.0


class Supervisor:
    """Owner of one core process. A thread of its own starts and watches it: the kernel ties a child's life to the
    *thread* that started it, so that thread must live as long as the supervisor."""

    def __init__(
        self,
        command: Callable[[int], Sequence[str]],
        address: CoreAddress,
        *,
        environment: dict[str, str] | None = None,
        config: SupervisorConfig | None = None,
    ) -> None:
        """`command(fd)` is the core's command line, `fd` its end of the pipe (`--report-fd`)."""
        self._command, self._address, self._environment = command, address, environment
        self._config = config or SupervisorConfig()
        self._changed = threading.Condition()
        self._status = CoreStatus(state="starting", supervisor_pid=os.getpid())
        self._process: subprocess.Popen[bytes] | None = None
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
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(drain_timeout_s)
            if process.poll() is None:
                process.kill()
        if self._thread.is_alive():
            self._thread.join()
        self._set(state="closed")
        self._address.remove()

    def _run(self) -> None:
        failed_starts = short_lives = 0
        while not self._closing.is_set():
            born_s = time.monotonic()
            was_ready, failure = self._run_once()
            if self._closing.is_set():
                break
            failed_starts = 0 if was_ready else failed_starts + 1
            short_lives = 0 if time.monotonic() - born_s >= self._config.long_life_s else short_lives + 1
            log.error("engine core ended: %s: %s", failure.error, failure.message)
            if failure.error in _PERMANENT or failed_starts >= self._config.max_failed_starts:
                self._set(state="lost", error=failure.error, message=failure.message, core_pid=0)
                return
            first = self._status.state == "starting"
            self._set(
                state="starting" if first else "restarting",
                restarts=self._status.restarts + 1,
                error=failure.error,
                message=failure.message,
                core_pid=0,
            )
            if short_lives > 1:
                self._closing.wait(min(self._config.backoff_s * 2 ** (short_lives - 2), self._config.max_backoff_s))

    def _run_once(self) -> tuple[bool, Report]:
        """One life of a core: whether it became ready, and how it ended."""
        reader, writer = os.pipe()
        try:
            try:
                process = subprocess.Popen(
                    self._command(writer), pass_fds=(writer,), stdin=subprocess.DEVNULL, env=self._environment
                )
            except OSError as error:
                return False, Report("failed", error=ConfigError.__name__, message=f"cannot start the core: {error}")
            finally:
                os.close(writer)
            self._process = process
            if self._closing.is_set():
                process.terminate()
            was_ready, failure = self._watch(process, reader)
            code = process.wait()
            if failure is None:
                how = f"signal {-code}" if code < 0 else f"exit status {code}"
                failure = Report("failed", error=EngineLost.__name__, message=f"the engine core died ({how})")
            return was_ready, failure
        finally:
            os.close(reader)

    def _watch(self, process: subprocess.Popen[bytes], reader: int) -> tuple[bool, Report | None]:
        """Follow the core's reports until its end of the pipe closes, which it does when the process dies."""
        buffer, ready, failure = bytearray(), False, None
        poller = select.poll()
        poller.register(reader, select.POLLIN)
        deadline_s = time.monotonic() + self._config.start_timeout_s
        while True:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not poller.poll(left_s * 1000):
                if self._closing.is_set():
                    deadline_s = time.monotonic() + self._config.start_timeout_s  # close() has its own limit
                    continue
                what = "gave no sign of life" if ready else "was not ready"
                limit_s = self._config.hang_limit_s if ready else self._config.start_timeout_s
                process.kill()
                return ready, Report("failed", f"the engine core {what} for {limit_s:g} s", EngineLost.__name__)
            data = os.read(reader, 65536)
            if not data:
                return ready, failure
            buffer += data
            for report in parse_reports(buffer):
                if report.kind == "ready":
                    ready = True
                    self._set(state="ready", core_pid=process.pid, error="", message="", progress="")
                elif report.kind == "progress":
                    self._set(progress=report.message, core_pid=process.pid)
                elif report.kind == "failed":
                    failure = report
            if ready:
                deadline_s = time.monotonic() + self._config.hang_limit_s

    def _set(self, **changes: object) -> None:
        with self._changed:
            values = {name: getattr(self._status, name) for name in CoreStatus.__struct_fields__}
            self._status = CoreStatus(**{**values, **changes})
            if self._address.folder.is_dir():
                write_status(self._address.status, self._status)
            self._changed.notify_all()
