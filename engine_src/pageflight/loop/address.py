"""Where a core and its fronts meet: a private directory that both work out from the same facts.

The directory holds two sockets and the supervisor's status. It is named after (user, server process, repository,
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
    """Directories of supervisors that were killed before they could tidy up."""
    for owner in root.glob(f"*/{_OWNER}"):
        with contextlib.suppress(OSError, ValueError):
            if not process_exists(int(owner.read_text(encoding="ascii"))):
                shutil.rmtree(owner.parent, ignore_errors=True)


def process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
