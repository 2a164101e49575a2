"""What an idle server holds: processes, descriptors, threads, segments, files. Compared before and after."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from perf.processes import num_zombies, shared_memory, tree
from perf.soak.checks import Check, nothing

FDS_SLACK = 8
"""Per process. Idle connections of clients that have just gone, and a metrics scrape under way."""
THREADS_SLACK = 4
"""Per process. gRPC and libevent of tritonserver make threads as they need them and keep some."""
_INSTANCES = 2  # of a model, at most
KEPT_THREADS, KEPT_FDS, KEPT_SEGMENTS = 40 * _INSTANCES, 4 * _INSTANCES, _INSTANCES
"""What tritonserver 2.51 keeps, until it ends, of a model that it cannot unload: of one with a stub that was killed in
the middle of an exchange. Such a stub stays as a zombie, which is how they are counted. About 35 threads for each
instance were measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """The most of any process of a role."""

    roles: Counter[str]
    num_fds: dict[str, int]
    num_threads: dict[str, int]
    segments: frozenset[str]  # shared memory that tritonserver or a stub has mapped
    files: frozenset[str]  # sockets and other meeting places, without the numbers of processes
    num_zombies: int


def footprint(serve_pid: int, runtime: Path) -> Footprint:
    """`runtime` is the folder in which the server's processes meet."""
    samples = tree(serve_pid)
    fds: dict[str, int] = {}
    threads: dict[str, int] = {}
    for sample in samples:
        role = sample.life.role
        fds[role] = max(fds.get(role, 0), sample.num_fds)
        threads[role] = max(threads.get(role, 0), sample.num_threads)
    return Footprint(
        roles=Counter(sample.life.role for sample in samples),
        num_fds=fds,
        num_threads=threads,
        segments=frozenset().union(*(shared_memory(sample.life.pid) for sample in samples)),
        files=files_in(runtime),
        num_zombies=sum(num_zombies(sample.life.pid) for sample in samples),
    )


def files_in(runtime: Path) -> frozenset[str]:
    return frozenset(str(path.relative_to(runtime)) for path in runtime.rglob("*") if not path.is_dir())


def compare(before: Footprint, after: Footprint, *, num_stub_kills: int) -> list[Check]:
    """Nothing may have grown beyond the slack declared above."""
    changed = {role for role in before.roles | after.roles if before.roles[role] != after.roles[role]}
    checks = [nothing("roles whose number of processes changed", changed)]
    num_kept = min(after.num_zombies, num_stub_kills)
    for role in sorted(before.roles):
        keeps = num_kept if role == "tritonserver" else 0
        fds_slack, threads_slack = FDS_SLACK + keeps * KEPT_FDS, THREADS_SLACK + keeps * KEPT_THREADS
        checks.append(_grown(f"open files of {role}", before.num_fds, after.num_fds, role, fds_slack))
        checks.append(_grown(f"threads of {role}", before.num_threads, after.num_threads, role, threads_slack))
    added = len(after.segments) - len(before.segments)
    checks.append(Check("shared-memory segments more than before", added, num_kept * KEPT_SEGMENTS))
    checks.append(Check("files in the meeting place more than before", len(after.files) - len(before.files), 0))
    checks.append(Check("killed stubs that tritonserver could not unload", after.num_zombies, num_stub_kills))
    return checks


def _grown(name: str, before: dict[str, int], after: dict[str, int], role: str, slack: int) -> Check:
    return Check(name, after.get(role, 0), before[role] + slack, f"{before[role]} before")
