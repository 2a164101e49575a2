"""A Ray cluster of several nodes on this machine, each in a network namespace of its own where that is permitted."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

_CLONE_NEWNET = 0x40000000
_RAY = Path(sys.executable).with_name("ray")
_START = ["--disable-usage-stats", "--object-store-memory=80000000", "--num-cpus=2", "--num-gpus=2"]
_SOON = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
}
"""A node that says nothing is given up after some 5 s, not 15."""


def _environment(is_isolated: bool) -> dict[str, str]:
    """Of a node's processes: not with the interface that an engine of an earlier test has chosen for this process."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
    return kept | (_SOON if is_isolated else {})


class Machine:
    """A network namespace on the switch's network, held by a process that sleeps; or this machine itself."""

    def __init__(self, number: int, switch: Machine | None = None, *, is_isolated: bool) -> None:
        self.address = f"10.77.0.{number}" if is_isolated else "127.0.0.1"
        self._holder: subprocess.Popen[bytes] | None = None
        if not is_isolated:
            return
        self._holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        while not self._is_isolated():
            assert self._holder.poll() is None, "unshare failed"
        self.ip("link set lo up")
        if switch is None:
            self.ip("link add switch type bridge", "link set switch up")
            return
        switch.ip(
            f"link add port{number} type veth peer name eth0 netns {self._holder.pid}",
            f"link set port{number} master switch up",
        )
        self.ip(f"addr add {self.address}/24 dev eth0", "link set eth0 up")

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What this thread starts within the block, processes and threads, is on the machine."""
        if self._holder is None:
            yield
            return
        with open("/proc/thread-self/ns/net", "rb") as before, open(self._namespace(self._holder.pid), "rb") as inside:
            _set_namespace(inside.fileno())
            try:
                yield
            finally:
                _set_namespace(before.fileno())

    def ip(self, *commands: str) -> None:
        with self.entered():
            for command in commands:
                subprocess.run(["ip", *command.split()], check=True)

    def kill_all(self) -> None:
        """Every process of the machine, at once."""
        assert self._holder is not None
        for process in self.processes():
            process.send_signal(signal.SIGKILL)

    def processes(self) -> list[psutil.Process]:
        """All that run on it, but its holder."""
        assert self._holder is not None
        ours = os.stat(self._namespace(self._holder.pid)).st_ino
        found = []
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                if os.stat(self._namespace(process.pid)).st_ino == ours and process.pid != self._holder.pid:
                    found.append(process)
        return found

    def close(self) -> None:
        if self._holder is not None:
            self.kill_all()
            self._holder.kill()
            self._holder.wait()

    def _is_isolated(self) -> bool:
        assert self._holder is not None
        return os.stat(self._namespace(self._holder.pid)).st_ino != os.stat("/proc/self/ns/net").st_ino

    @staticmethod
    def _namespace(pid: int) -> str:
        return f"/proc/{pid}/ns/net"


def _set_namespace(fd: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def why_not_isolated() -> str:
    """Why machines cannot have networks of their own here; empty where they can."""
    try:
        tried = subprocess.run(["unshare", "--net", "ip", "link", "set", "lo", "up"], capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return tried.stderr.strip() if tried.returncode else ""


class RayCluster:
    """Of Ray's own processes. `head` is the first machine."""

    def __init__(self, why_not_isolated: str) -> None:
        """`why_not_isolated` is not empty: all nodes are at one address."""
        self._closing = ExitStack()
        # Ray's sockets are below it, and their paths have 107 bytes at most: not below pytest's folder.
        self._folder = Path(
            self._closing.enter_context(TemporaryDirectory(prefix="pf", dir="/tmp", ignore_cleanup_errors=True))
        )
        self.why_not_isolated, self.is_isolated = why_not_isolated, not why_not_isolated
        self._num_machines = 0
        self._switch = Machine(0, is_isolated=self.is_isolated)
        self._closing.callback(self._switch.close)
        self.head = self._machine()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.address = f"{self.head.address}:{self._port}"
        self.machines: list[Machine] = []
        self.start_node(self.head)

    def add(self) -> Machine:
        """Another machine with a node on it."""
        machine = self._machine()
        self.start_node(machine)
        return machine

    def start_node(self, machine: Machine) -> None:
        is_first = not self.machines
        where = (
            ["--head", f"--port={self._port}", f"--temp-dir={self._folder}", "--include-dashboard=false"]
            if is_first
            else [f"--address={self.address}"]
        )
        with machine.entered():
            started = subprocess.run(
                [_RAY, "start", *where, f"--node-ip-address={machine.address}", *_START],
                capture_output=True,
                text=True,
                env=_environment(self.is_isolated),
            )
            assert started.returncode == 0, started.stdout + started.stderr
        if machine not in self.machines:
            self.machines.append(machine)

    def close(self) -> None:
        for process in psutil.process_iter():  # also those of nodes that share an address; not anybody else's
            with suppress(psutil.Error):
                if str(self._folder) in " ".join(process.cmdline()) and process.pid != os.getpid():
                    process.kill()
        self._closing.close()

    def _machine(self) -> Machine:
        self._num_machines += 1
        machine = Machine(self._num_machines, self._switch, is_isolated=self.is_isolated)
        self._closing.callback(machine.close)
        return machine
