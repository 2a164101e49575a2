from __future__ import annotations

import os
import socket
from pathlib import Path

from pageflight.backend.descriptors import close_inherited_sockets


def process(folder: Path, program: str, *descriptors: tuple[int, str]) -> Path:
    """A process as /proc shows it."""
    (folder / "fd").mkdir(parents=True)
    (folder / "exe").symlink_to(f"/backends/python/{program}")
    for number, target in descriptors:
        (folder / "fd" / str(number)).symlink_to(target)
    return folder


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def test_a_stub_lets_go_of_its_server_s_sockets_and_of_nothing_else(tmp_path: Path) -> None:
    """Connections of clients did not end when the server closed them: a stub that was loaded again held them, too."""
    ours, theirs = socket.socketpair()
    with ours, theirs, (tmp_path / "file").open("w") as file:
        listed = (
            (theirs.fileno(), "socket:[4711]"),
            (file.fileno(), "/dev/shm/region"),
            (99999, "socket:[gone]"),
            (2, "socket:[log]"),
        )
        close_inherited_sockets(process(tmp_path / "stub", "triton_python_backend_stub", *listed))
        assert not is_open(theirs.detach()) and is_open(ours.fileno()) and is_open(file.fileno()) and is_open(2)


def test_no_other_process_loses_its_sockets(tmp_path: Path) -> None:
    """Settings are read by other programs as well."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        close_inherited_sockets(process(tmp_path / "other", "python3", (theirs.fileno(), "socket:[4711]")))
        close_inherited_sockets(tmp_path / "nobody")
        assert is_open(theirs.fileno())
