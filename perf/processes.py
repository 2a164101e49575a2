"""The server's processes as /proc shows them: who there is, in which role, and what each one holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_KIB = os.sysconf("SC_PAGE_SIZE") // 1024
_STUB, _CORE, _SERVER = "triton_python_backend_stub", "pageflight.loop.core_process", "tritonserver"


@dataclass(frozen=True, slots=True)
class Life:
    """One process, told from a later one with the same number by when it was started."""

    role: str
    pid: int
    start: int  # clock ticks since boot

    @property
    def is_running(self) -> bool:
        return _start_of(self.pid) == self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    life: Life
    parent: int
    rss_kib: int
    num_fds: int
    num_threads: int
    cpu_s: float  # user and system time so far


def tree(pid: int) -> list[Sample]:
    """The process and everything below it that lives; what ends meanwhile is left out."""
    found, waiting = [], [(pid, 0)]
    while waiting:
        current, parent = waiting.pop()
        try:
            sample = _sample(current, parent)
            children = [(child, current) for child in _children(current)]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if sample is not None:
            found.append(sample)
        waiting += children
    return found


def num_zombies(pid: int) -> int:
    """Children of this process that have died and that nobody has taken note of."""
    return sum(_start_of(child) is None for child in _children(pid))


def shared_memory(pid: int) -> frozenset[str]:
    """Names of the shared-memory segments that a process has mapped."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return frozenset()
    return frozenset(line.rpartition("/dev/shm/")[2].split()[0] for line in lines if "/dev/shm/" in line)


def _sample(pid: int, parent: int) -> Sample | None:
    start = _start_of(pid)
    if start is None:
        return None
    folder = Path(f"/proc/{pid}")
    arguments: list[str] = folder.joinpath("cmdline").read_bytes().decode(errors="replace").split("\0")
    if not arguments[0]:
        return None  # it begins or ends at this moment
    resident = int(folder.joinpath("statm").read_text(encoding="ascii").split()[1])
    return Sample(
        life=Life(_role(arguments), pid, start),
        parent=parent,
        rss_kib=resident * _PAGE_KIB,
        num_fds=len(os.listdir(folder / "fd")),
        num_threads=len(os.listdir(folder / "task")),
        cpu_s=_cpu_s(folder),
    )


def _cpu_s(folder: Path) -> float:
    fields = folder.joinpath("stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _role(arguments: list[str]) -> str:
    program = Path(arguments[0]).name
    if program == _STUB:
        return f"stub {Path(arguments[1]).parts[-3]}"
    if _CORE in arguments:
        return "core"
    if program == _SERVER:
        return _SERVER
    return "serve" if "serve" in arguments else program


def _children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            yield from map(int, task.joinpath("children").read_text(encoding="ascii").split())
        except (FileNotFoundError, ProcessLookupError):
            continue


def _start_of(pid: int) -> int | None:
    """None when it does not live: a zombie does not."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = line.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])
