"""The meeting place of cores and fronts."""

from __future__ import annotations

import os
import stat
import subprocess
import time
from pathlib import Path

import pytest

from pageflight.core.errors import ConfigError
from pageflight.loop.address import CoreAddress, instance_address, private_address, process_exists, process_start
from pageflight.loop.status import CoreStatus, read_status, write_status


def test_both_stubs_of_an_instance_find_the_same_place_and_nobody_else_does(tmp_path: Path) -> None:
    here = instance_address(tmp_path, "engine", 0, server_pid=7)
    assert instance_address(tmp_path / "x" / "..", "engine", 0, server_pid=7) == here
    others = [
        instance_address(tmp_path, "engine", 1, server_pid=7),
        instance_address(tmp_path, "other", 0, server_pid=7),
        instance_address(tmp_path, "engine", 0, server_pid=8),
        instance_address(tmp_path / "b", "engine", 0, server_pid=7),
    ]
    assert len({here, *others}) == 5


def test_the_place_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever can write to the socket can read other people's prompts."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    old_mask = os.umask(0)
    try:
        address = private_address()
        address.create()
        assert address.folder.is_relative_to(tmp_path)
        for folder in (address.folder, address.folder.parent):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    finally:
        os.umask(old_mask)
    address.remove()
    assert not address.folder.exists()


def test_a_long_runtime_directory_does_not_break_the_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Socket paths end at 107 bytes; zmq reports a longer one as `file name too long` at start."""
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    for name in ("XDG_RUNTIME_DIR", "TMPDIR"):
        monkeypatch.setenv(name, str(deep))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert len(os.fsencode(private_address().events)) <= 107 + len("ipc://")


def test_a_place_that_is_a_link_is_refused(tmp_path: Path) -> None:
    """Another user could have put it there, pointing to a directory of his."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="XDG_RUNTIME_DIR"):
        CoreAddress(tmp_path / "root" / "a").create()


def test_a_place_taken_over_by_another_process_is_not_removed(tmp_path: Path) -> None:
    """When a model is reloaded, the old stub closes after the new one has opened."""
    address = CoreAddress(tmp_path / "root" / "a")
    address.create()
    (address.folder / "owner").write_text("1", encoding="ascii")
    address.remove()
    assert address.folder.is_dir()


def test_the_status_file_says_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    assert read_status(path) is None
    status = CoreStatus(state="lost", supervisor_pid=3, error="ManifestMismatch", message="built for another machine")
    write_status(path, status)
    assert read_status(path) == status and type(status.failure).__name__ == "ManifestMismatch"


def test_a_process_that_has_died_does_not_exist() -> None:
    """Triton takes no note of a dead stub, which stays as a zombie: its fronts waited for the supervisor in it."""
    process = subprocess.Popen(["sleep", "100"])
    assert process_exists(process.pid) and process_start(process.pid) == process_start(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not process_exists(process.pid)
    process.wait()
    assert not process_exists(process.pid)


def test_a_process_is_told_from_a_later_one_with_its_number() -> None:
    """Numbers come round again."""
    processes = []
    for _ in range(2):
        processes.append(subprocess.Popen(["sleep", "100"]))
        time.sleep(2 / os.sysconf("SC_CLK_TCK"))
    assert process_start(processes[0].pid) != process_start(processes[1].pid)
    for process in processes:
        process.kill()
        process.wait()
    assert process_start(2**22 + 1) is None
