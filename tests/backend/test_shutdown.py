"""What a stub can see of its server's end, in a made-up /proc."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pageflight.backend.shutdown import UNLOAD_S, Shutdown
from pageflight.loop.address import drain_marker, private_address, set_drain_marker

PID = os.getpid()
LISTENING = "   0: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 777 1 0 100\n"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A server on port 8000 whose descriptor 5 is the listening socket."""
    process = tmp_path / str(PID)
    (process / "net").mkdir(parents=True)
    (process / "net" / "tcp").write_text("  sl  local_address rem_address st\n" + LISTENING)
    (process / "net" / "tcp6").write_text("  sl  local_address rem_address st\n")
    (process / "fd").mkdir()
    (process / "fd" / "4").symlink_to("socket:[776]")
    (process / "fd" / "5").symlink_to("socket:[777]")
    write_command(process, "--model-repository=/r", "--exit-timeout-secs=20")
    return tmp_path


@pytest.fixture(autouse=True)
def no_marker() -> Iterator[None]:
    yield
    drain_marker(PID).unlink(missing_ok=True)


def write_command(process: Path, *arguments: str) -> None:
    (process / "cmdline").write_bytes("\0".join(("tritonserver", *arguments, "")).encode())


def test_a_server_whose_http_port_closes_is_ending(proc: Path) -> None:
    shutdown = Shutdown(PID, proc)
    shutdown.serving()
    assert not shutdown.has_begun()
    (proc / str(PID) / "fd" / "5").unlink()
    assert shutdown.has_begun()
    assert 0 < shutdown.left_s() <= 20 - UNLOAD_S


def test_a_descriptor_that_is_used_again_is_not_the_port(proc: Path) -> None:
    """The next client got the number of the closed socket, and the server seemed to live."""
    shutdown = Shutdown(PID, proc)
    shutdown.serving()
    descriptor = proc / str(PID) / "fd" / "5"
    descriptor.unlink()
    descriptor.symlink_to("socket:[999]")
    assert shutdown.has_begun()


@pytest.mark.parametrize("arguments", [("--http-port=9000",), ("--http-port", "9000"), ("--allow-http=false",)])
def test_a_server_without_that_port_is_never_thought_to_end(proc: Path, arguments: tuple[str, ...]) -> None:
    write_command(proc / str(PID), *arguments)
    shutdown = Shutdown(PID, proc)
    shutdown.serving()
    (proc / str(PID) / "fd" / "5").unlink()
    assert not shutdown.has_begun()


def test_an_announced_end_counts_from_the_announcement(proc: Path) -> None:
    shutdown = Shutdown(PID, proc)
    marker = set_drain_marker(PID)
    long_ago = marker.stat().st_mtime - 100
    os.utime(marker, (long_ago, long_ago))
    assert shutdown.has_begun() and shutdown.left_s() == 0


@pytest.mark.parametrize(
    ("arguments", "left_s"),
    [((), 27), (("--exit-timeout-secs", "60"), 57), (("--exit-timeout-secs=4",), 2), (("--exit-timeout-secs=x",), 27)],
)
def test_the_server_keeps_some_of_its_exit_timeout(proc: Path, arguments: tuple[str, ...], left_s: float) -> None:
    """Streams that ended with the timeout were never told so."""
    write_command(proc / str(PID), *arguments)
    assert Shutdown(PID, proc).left_s() == pytest.approx(left_s, abs=0.01)


def test_a_process_that_cannot_be_read_is_no_reason_to_fail(tmp_path: Path) -> None:
    shutdown = Shutdown(PID, tmp_path)
    shutdown.serving()
    assert not shutdown.has_begun()


def test_markers_of_servers_that_are_gone_are_removed() -> None:
    """A server with the process number of one that was killed while it drained refused everything."""
    marker = drain_marker(PID)
    stale = marker.with_name("draining-1-1")
    set_drain_marker(PID)
    stale.touch()
    address = private_address()
    address.create()
    assert marker.exists() and not stale.exists()
    address.remove()
