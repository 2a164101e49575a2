"""The end of the server, as its stubs can know it: whether it has begun, and how much time it leaves.

Facts about tritonserver 2.51, measured. At SIGTERM it waits until nobody is connected to its HTTP port and closes that
port. Then it unloads all models: new requests are refused, open ones go on, and `finalize` is called when a model has
none left; a stub needs one to three seconds more to go. When the exit timeout is over before that, the server aborts
without a word to its clients. Nothing tells a stub of all this, so it looks: for the marker of whoever ends the server
only after the last answer, and for the open HTTP port.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from pageflight.loop.address import drain_marker

UNLOAD_S = 3.0
"""Of the exit timeout, what the server needs for itself."""
_DEFAULT_EXIT_TIMEOUT_S = 30.0
_DEFAULT_HTTP_PORT = 8000
_LISTENING = "0A"  # the state's name in /proc/net/tcp


class Shutdown:
    """The end of the server with this process id."""

    def __init__(self, server_pid: int, proc: Path = Path("/proc")) -> None:
        self._process = proc / str(server_pid)
        self._options = _options(self._process / "cmdline")
        timeout = self._options.get("exit-timeout-secs", "")
        timeout_s = float(timeout) if timeout.isdigit() else _DEFAULT_EXIT_TIMEOUT_S
        self._limit_s = max(timeout_s - UNLOAD_S, timeout_s / 2)
        self._marker = drain_marker(server_pid)
        self._port: tuple[Path, str] | None = None
        self._began_s: float | None = None

    def serving(self) -> None:
        """The server is up: from now on its HTTP port is open until it ends."""
        self._port = self._find_port()

    def has_begun(self) -> bool:
        """Whether the server takes no new requests any more. Costs a few microseconds."""
        if self._began_s is not None:
            return True
        try:
            self._began_s = time.monotonic() - max(0.0, time.time() - self._marker.stat().st_mtime)
        except FileNotFoundError:
            if self._port is not None and not _is_link(*self._port):
                self._began_s = time.monotonic()
        return self._began_s is not None

    def left_s(self) -> float:
        """How long open requests may still run."""
        begun_s = self._began_s if self.has_begun() and self._began_s is not None else time.monotonic()
        return max(0.0, begun_s + self._limit_s - time.monotonic())

    def _find_port(self) -> tuple[Path, str] | None:
        """The descriptor of the listening HTTP socket and what it links to; None where there is none to be seen."""
        if self._options.get("allow-http", "true").lower() not in ("true", "1"):
            return None
        number = self._options.get("http-port", "")
        port = int(number) if number.isdigit() else _DEFAULT_HTTP_PORT
        try:
            lines = [
                line.split()
                for name in ("tcp", "tcp6")
                for line in (self._process / "net" / name).read_text().splitlines()
            ]
            inodes = {words[9] for words in lines if words[1].endswith(f":{port:04X}") and words[3] == _LISTENING}
            for descriptor in (self._process / "fd").iterdir():
                for inode in inodes:
                    if _is_link(descriptor, f"socket:[{inode}]"):
                        return descriptor, f"socket:[{inode}]"
        except OSError:  # another user's process, or a system without these files
            pass
        return None


def _options(command_line: Path) -> dict[str, str]:
    """`--name=value` and `--name value` of a process' command line."""
    try:
        words = command_line.read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return {}
    options = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            options[name] = value if has_value else following
    return options


def _is_link(path: Path, target: str) -> bool:
    try:
        return os.readlink(path) == target
    except OSError:
        return False
