"""Where a core and its fronts meet: a private directory that both work out from the same facts.

The directory holds two sockets and what the supervisor has to say. It is named after (user, server process, repository,
engine model, instance), so two servers never meet by accident and both Triton stubs of an instance always do.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pageflight.core.errors import ConfigError

_MAX_SOCKET_PATH = 107  # bytes: sockaddr_un.sun_path holds 108 with the closing zero
_OWNER = "owner"
_DRAINING = "draining-"


@dataclass(frozen=True, slots=True)
class CoreAddress:
    """One core's meeting place."""

    folder: Path

    @property
    def commands(self) -> str:
        """Fronts push requests here."""
        return f"ipc://{self.folder}/commands"

    @property
    def events(self) -> str:
        """Fronts introduce themselves and receive frames here."""
        return f"ipc://{self.folder}/events"

    @property
    def status(self) -> Path:
        """The supervisor's word on the core (`status.CoreStatus`)."""
        return self.folder / "status.json"

    @property
    def deaths(self) -> Path:
        """How its last cores ended (`deaths.Death`)."""
        return self.folder / "deaths.json"

    @property
    def tenants(self) -> Path:
        """The last good shares of tenants (`tenants_file.TenantsFile`)."""
        return self.folder / "tenants.json"

    def create(self) -> None:
        """Make the directory, mode 0700. Raises ConfigError when somebody else's stands in its place."""
        root = self.folder.parent
        _make_private(root)
        _remove_orphans(root)
        shutil.rmtree(self.folder, ignore_errors=True)
        _make_private(self.folder)
        (self.folder / _OWNER).write_text(str(os.getpid()), encoding="ascii")

    def remove(self) -> None:
        """Remove the directory, unless another process has taken the place meanwhile (a model that was reloaded)."""
        with contextlib.suppress(OSError):
            if (self.folder / _OWNER).read_text(encoding="ascii") == str(os.getpid()):
                shutil.rmtree(self.folder, ignore_errors=True)


def instance_address(repository: Path, engine_model: str, instance: int, *, server_pid: int) -> CoreAddress:
    """The meeting place of instance `instance` of `engine_model`. `server_pid` is tritonserver's: a stub's parent."""
    facts = f"{server_pid}\0{repository.resolve()}\0{engine_model}\0{instance}"
    return _at(hashlib.sha256(facts.encode("utf-8", "surrogateescape")).hexdigest()[:16])


def drain_marker(server_pid: int) -> Path:
    """The file whose being there tells the fronts of this tritonserver that it takes no new requests any more."""
    return _at(f"{_DRAINING}{server_pid}-{process_start(server_pid)}").folder


def set_drain_marker(server_pid: int) -> Path:
    """Announce the end of this server. The returned file is to be removed when it has ended."""
    marker = drain_marker(server_pid)
    _make_private(marker.parent)
    marker.touch(mode=0o600)
    return marker


def stub_folder(server_pid: int) -> Path:
    """Where the stubs of a tritonserver keep their ledgers (`backend.ledger`)."""
    return _at(f"stubs-{server_pid}").folder


def make_stub_folder(server_pid: int) -> Path:
    """The same, made if it is not there. It is removed like a core's when the server is gone."""
    folder = stub_folder(server_pid)
    _make_private(folder.parent)
    _remove_orphans(folder.parent)
    _make_private(folder)
    (folder / _OWNER).write_text(str(server_pid), encoding="ascii")
    return folder


def remove_leftovers() -> None:
    """Remove the meeting places of processes that have ended without tidying up."""
    _remove_orphans(_at("any").folder.parent)


def private_address() -> CoreAddress:
    """A meeting place nobody else can work out, for a core that serves this process only."""
    return _at(f"{os.getpid()}-{os.urandom(6).hex()}")


def _at(name: str) -> CoreAddress:
    roots = []
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime_dir and os.access(runtime_dir, os.W_OK):
        roots.append(Path(runtime_dir) / "pageflight")
    roots.append(Path(tempfile.gettempdir()) / f"pageflight-{os.getuid()}")
    roots.append(Path("/tmp") / f"pageflight-{os.getuid()}")
    for root in roots:
        address = CoreAddress(root / name)
        if len(os.fsencode(address.commands.removeprefix("ipc://"))) <= _MAX_SOCKET_PATH:
            return address
    raise AssertionError("the path below /tmp always fits")


def _make_private(folder: Path) -> None:
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ConfigError(f"{folder} belongs to somebody else or is no directory; remove it or set XDG_RUNTIME_DIR")
    if stat.S_IMODE(status.st_mode) != 0o700:
        folder.chmod(0o700)


def _remove_orphans(root: Path) -> None:
    """Directories of supervisors, and markers of servers, that were killed before they could tidy up."""
    for marker in root.glob(f"{_DRAINING}*-*"):
        pid, _, start = marker.name.removeprefix(_DRAINING).partition("-")
        with contextlib.suppress(OSError, ValueError):
            if str(process_start(int(pid))) != start:
                marker.unlink()
    for owner in root.glob(f"*/{_OWNER}"):
        with contextlib.suppress(OSError, ValueError):
            if not process_exists(int(owner.read_text(encoding="ascii"))):
                shutil.rmtree(owner.parent, ignore_errors=True)


def process_exists(pid: int) -> bool:
    """Whether the process lives. One that has died stays visible until its parent takes note, which Triton does not."""
    return process_start(pid) is not None


def process_start(pid: int) -> int | None:
    """When the process was started, in clock ticks since boot, which tells it from a later one with its number; None
    when it does not live."""
    try:
        stat_line = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat_line.rpartition(")")[2].split()  # the name before may hold anything
    return None if fields[0] in ("Z", "X") else int(fields[19])
