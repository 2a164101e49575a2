"""How `serve` and `up` guard their server: what it is started with for that, and the life of its watchdog."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pageflight.cli.console import tell
from pageflight.cli.repository_api import RepositoryApi, new_key
from pageflight.cli.server_flags import ServerFlags
from pageflight.cli.tritonserver import ServerCommand
from pageflight.cli.watchdog import Patience, Watchdog

_MODE = "--model-control-mode"


class ServerGuard:
    """The guard of one server; none at all with `--no-watchdog`."""

    def __init__(self, command: ServerCommand, flags: ServerFlags) -> None:
        """A person's own `--model-control-mode` is respected: only in mode explicit can models be loaded again."""
        self._flags = flags
        self._watchdog: Watchdog | None = None
        mode = _chosen(_MODE, command.arguments)
        self._can_reload = mode in ("", "explicit")
        key = "" if mode else new_key()
        self._api = RepositoryApi(address=f"{flags.ports.local_host}:{flags.grpc_port}", key=key)
        added = self._api.arguments if flags.watchdog and not mode else ()
        self.command = replace(command, arguments=(*command.arguments, *added))

    def start(self, server_pid: int) -> None:
        """Watch the server, which is ready."""
        if self._flags.watchdog:
            patience = Patience(restart_stuck_after_s=self._flags.restart_stuck_after)
            self._watchdog = Watchdog(server_pid, self._api, tell, can_reload=self._can_reload, patience=patience)
            self._watchdog.start()

    def stop_reloads(self) -> None:
        """The server drains: models that die stay away, but their requests still get an end."""
        if self._watchdog is not None:
            self._watchdog.stop_reloads()

    def stop(self) -> None:
        """The server is about to end."""
        if self._watchdog is not None:
            self._watchdog.stop()

    def only_corpses_are_left(self) -> bool:
        return self._watchdog is not None and self._watchdog.only_corpses_are_left()


def _chosen(option: str, arguments: Sequence[str]) -> str:
    """The value of an option given as `--option=value` or `--option value`; empty when it is not."""
    for argument, following in zip(arguments, (*arguments[1:], ""), strict=True):
        name, _, value = argument.partition("=")
        if name == option:
            return value or following
    return ""
