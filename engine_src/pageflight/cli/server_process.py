"""One tritonserver as a child process: started, waited for, listened to, drained."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pageflight.cli import draining
from pageflight.cli.client import is_ready
from pageflight.cli.errors import ServerCrash, ServerStartError

WAITING = "waiting for rank"
"""What a core says that waits for other machines."""
_KEPT_LINES = 400
_POLL_S = 0.05
_UNLOAD_S = 10.0
"""What the server gets at least to unload its models, however little is left of the time to drain. It uses up what it
gets where a client keeps an idle HTTP connection, for which Triton waits."""
_DRAIN_POLL_S = 0.25
_HOPELESS_S = 3.0
_PR_SET_PDEATHSIG = 1
_FAILED = re.compile(r"failed to load '([^']+)'(?: version \d+)?: (.*)")
_PREFIX = re.compile(r"^[EWIF]\d{4} [\d:.]+ \d+ \S+:\d+\] ?")
_NO_GPU = re.compile(r"instance group (\S+) of model \S+ specifies invalid or unsupported gpu id (\d+)\..* are: *(.*)")
_CONSEQUENCES = ("which is not ready", "no available versions", "depends on")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Where the server listens."""

    host: str = "0.0.0.0"
    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    def check_free(self) -> None:
        """Raises ServerStartError naming the option of a port that is taken or doubly used."""
        named = {"http-port": self.http, "grpc-port": self.grpc, "metrics-port": self.metrics}
        for option, port in named.items():
            if list(named.values()).count(port) > 1:
                raise ServerStartError(f"--{option}={port}: the three ports must differ")
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((self.host, port))
                except OSError as error:
                    raise ServerStartError(
                        f"--{option}={port}: {error.strerror or error}; stop what uses it or choose another port"
                    ) from None

    @property
    def local_host(self) -> str:
        """A host name by which this machine reaches the server."""
        return "localhost" if self.host in ("0.0.0.0", "::") else self.host


class ServerProcess:
    """tritonserver in a session of its own: Ctrl-C reaches this program alone, which then drains the server."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], ports: Ports, *, verbose: bool) -> None:
        self._ports = ports
        self._verbose = verbose
        self._ready = False
        self._num_cut_off = 0
        self._lines: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
        parent = os.getpid()

        def die_with_parent() -> None:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it went before the line above
                os._exit(1)

        self._process = subprocess.Popen(
            list(command),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self._reader = threading.Thread(target=self._read, name="tritonserver-log", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def num_cut_off(self) -> int:
        """Requests that were open when `drain` had to kill the server."""
        return self._num_cut_off

    def wait_ready(self, tell: Callable[[str], None]) -> None:
        """Block until all models are ready; `tell` gets a word of what is going on.

        Raises ServerStartError with the reasons when the server ends first, ServerCrash when a signal ended it.
        """
        while not is_ready(self._ports.local_host, self._ports.http):
            if self._process.poll() is not None:
                self._reader.join(timeout=5)
                kind = ServerCrash if self._process.returncode < 0 else ServerStartError
                raise kind(self._why_it_ended())
            for line in reversed(self._lines):
                if match := re.search(f"{WAITING}.*", line):
                    tell(f"Starting tritonserver: {match[0]}")
                    break
                if match := re.search(r"(loading|successfully loaded) '?([\w.-]+)'?", line):
                    tell(f"Starting tritonserver: {match[1].removeprefix('successfully ')} {match[2]}")
                    break
            time.sleep(_POLL_S)
        self._ready = True

    def wait(self) -> int:
        """Block until the server ends; its exit status. A signal ends the wait at once."""
        if self._process.poll() is None:
            # `Popen.wait` would hold Ctrl-C back for a quarter of a second, in which the server took new requests.
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return self._process.wait()

    def drain(
        self,
        timeout_s: float,
        tell: Callable[[str], None],
        *,
        before_end: Callable[[], None] = lambda: None,
        is_hopeless: Callable[[], bool] = lambda: False,
    ) -> int:
        """Let open requests finish for `timeout_s` while new ones are refused, then end the server; its exit status.

        Ctrl-C ends it now. SIGTERM comes last, after `before_end`: at that, tritonserver forgets its models at once and
        tells clients that there are none, waits for idle connections, and aborts over what is still open at its exit
        timeout. It is killed when it is there after `timeout_s`, but not within ten seconds of SIGTERM. `is_hopeless`
        says that it waits for what will never be.
        """
        if self._process.poll() is not None:
            return self._ended()
        pid, until_s = self._process.pid, time.monotonic() + timeout_s
        try:
            with draining.refusing(pid):
                tell(f"draining: open requests finish, at most {timeout_s:.0f} s (Ctrl-C again stops at once)")
                draining.wait_until_idle(pid, timeout_s, lambda: self._process.poll() is not None or is_hopeless())
                before_end()
                self._process.send_signal(signal.SIGTERM)
                self._wait(max(until_s - time.monotonic(), _UNLOAD_S), is_hopeless)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self._num_cut_off = draining.num_open(pid) or 0
            cut_off = f": {self._num_cut_off} open requests are cut off" if self._num_cut_off else ""
            tell(f"stopping at once{cut_off}")
            self.kill()
        return self._ended()

    def _ended(self) -> int:
        status = self._process.wait()
        self._reader.join(timeout=5)
        return status

    def _wait(self, timeout_s: float, is_hopeless: Callable[[], bool]) -> int:
        """Raises TimeoutExpired when the time is up, or when it has been hopeless for a while."""
        until_s, hopeful_s = time.monotonic() + timeout_s, time.monotonic()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(_DRAIN_POLL_S)
            now_s = time.monotonic()
            hopeful_s = hopeful_s if is_hopeless() else now_s
            if now_s > until_s or now_s - hopeful_s > _HOPELESS_S:
                raise subprocess.TimeoutExpired(self._process.args, timeout_s)

    def kill(self) -> None:
        """End the server and its stub processes without waiting."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.append(line.rstrip("\n"))
                # While the server starts, warnings about a missing GPU are noise; errors are told when it has failed.
                if self._verbose or (self._ready and line.startswith("E") and _PREFIX.match(line)):
                    sys.stderr.write(line)

    def _why_it_ended(self) -> str:
        """The models' own reasons from the log, without what merely follows from them; else the last lines."""
        models: dict[str, list[str]] = {}
        for line in self._lines:
            match = _FAILED.search(line)
            if match and not any(word in match[2] for word in _CONSEQUENCES):
                # Triton writes newlines as \\n; what follows the first is a traceback.
                reason = match[2].split("\\n", 1)[0].strip(' "')
                for wrapping in ("Internal: ", "TritonModelException: "):
                    reason = reason.removeprefix(wrapping)
                if no_gpu := _NO_GPU.search(reason):
                    group, number, seen = no_gpu.groups()
                    reason = (
                        f"instance {group}: tritonserver has no GPU {number} (it sees {seen.strip(' ,') or 'none'});"
                        " look at nvidia-smi and CUDA_VISIBLE_DEVICES, or build with other --instances"
                    )
                models.setdefault(reason, []).append(match[1])
        if models:
            listed = "\n  ".join(f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in models.items())
            return f"the server could not load the repository:\n  {listed}\n  (--verbose shows the server's whole log)"
        tail = "\n  ".join(_PREFIX.sub("", line) for line in list(self._lines)[-8:])
        return f"tritonserver ended with status {self._process.returncode} before it was ready:\n  {tail}"
