"""`pageflight node`: the one command that torchrun or a LeaderWorkerSet runs on every machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pageflight.cli.errors import CommandError
from pageflight.cli.flags import takes
from pageflight.cli.join import LEADER_TIMEOUT_S, join_ranks
from pageflight.cli.machines import Machines, machines_of
from pageflight.cli.serve import serve
from pageflight.cli.server_flags import ServerFlags
from pageflight.cli.watch_flags import WatchFlags
from pageflight.ranks.external_launcher import EVERY_RANK_JOINS
from pageflight.ranks.key import rank_key

_TORCHRUN = ("RANK", "LOCAL_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR")
_LWS = ("LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE", "LWS_WORKER_INDEX")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a process is of the whole: the server where it `leads`; `devices` by rank of those that it has join.

    `every_rank_joins`: torchrun starts a process for each. `verifies`: this one hashes the engine for its machine; the
    leader's core does for its own.
    """

    leads: bool
    leader: str
    devices: Mapping[int, int]
    every_rank_joins: bool = False
    verifies: bool = True


def part_of(environment: Mapping[str, str], machines: Machines) -> Part:
    """From what torchrun or a LeaderWorkerSet has set. Raises CommandError for neither, and for a size that is not the
    repository's."""
    if all(name in environment for name in _LWS):
        leader, size, node = environment[_LWS[0]], _number(environment, _LWS[1]), _number(environment, _LWS[2])
        if size != machines.num_nodes:
            raise CommandError(f"LWS_GROUP_SIZE={size}: the model was built for nodes={machines.num_nodes}")
        return _machine(leader, node, machines)
    if not all(name in environment for name in _TORCHRUN):
        raise CommandError(
            f"neither torchrun ({', '.join(_TORCHRUN)}) nor a LeaderWorkerSet ({', '.join(_LWS)}) has started this; by"
            " hand it is `pageflight serve` on the first machine and `pageflight join` on the others"
        )
    leader = environment["MASTER_ADDR"]
    rank, local_rank, node, num_local, size = (_number(environment, name) for name in _TORCHRUN[:-1])
    if num_local == 1:
        if size != machines.num_nodes:
            raise CommandError(
                f"WORLD_SIZE={size}: the model was built for nodes={machines.num_nodes}; torchrun starts one process on"
                " each, or each rank"
            )
        return _machine(leader, node, machines)
    if size != machines.num_ranks or num_local != machines.ranks_per_node:
        raise CommandError(
            f"torchrun starts {num_local} of {size} processes here; the model was built for {machines.num_ranks} ranks,"
            f" {machines.ranks_per_node} on each of nodes={machines.num_nodes}"
        )
    return Part(
        leads=rank == 0,
        leader=leader,
        devices={} if rank == 0 else {rank: local_rank},
        every_rank_joins=True,
        verifies=local_rank == 0,
    )


@takes(ServerFlags, "flags")
@takes(WatchFlags, "watch_flags")
def node(
    repository: Annotated[Path, typer.Argument(help="This machine's copy of the model repository.")],
    flags: ServerFlags,
    watch_flags: WatchFlags,
    leader_timeout_s: Annotated[
        float, typer.Option(help="Seconds without a leader after which a machine gives up.", min=0)
    ] = LEADER_TIMEOUT_S,
    arguments: Annotated[
        list[str] | None, typer.Argument(help="After --: further arguments of tritonserver, as they are.")
    ] = None,
) -> None:
    """Serve on the first machine and join it on the others: what torchrun or a LeaderWorkerSet runs on each.

    Which machine this is says the environment that they set. The key that all machines share is in
    $PAGEFLIGHT_RANK_KEY, or in the file that $PAGEFLIGHT_RANK_KEY_FILE names.

    Example:

        torchrun --nnodes 2 --node-rank 0 --master-addr 10.0.0.1 --nproc-per-node 1 --no-python \\
            pageflight node repositories/demo --http-port 9000
    """
    machines = machines_of(repository)
    part = part_of(os.environ, machines)
    rank_key()
    if part.leads:
        os.environ[EVERY_RANK_JOINS] = str(int(part.every_rank_joins))  # to the core, by way of the server
        flag_values = {item: getattr(flags, item) for item in ServerFlags.__dataclass_fields__}
        watch_values = {item: getattr(watch_flags, item) for item in WatchFlags.__dataclass_fields__}
        serve(repository=repository, print_command=False, arguments=arguments, **flag_values, **watch_values)
    else:
        leader = part.leader, machines.rank_port
        join_ranks(repository, leader, part.devices, leader_timeout_s, verifies=part.verifies)


def _machine(leader: str, node: int, machines: Machines) -> Part:
    devices = {rank: index for index, rank in enumerate(machines.ranks_of(node))}
    return Part(leads=node == 0, leader=leader, devices={} if node == 0 else devices)


def _number(environment: Mapping[str, str], name: str) -> int:
    if not environment[name].isdigit():
        raise CommandError(f"{name}={environment[name]!r}: must be a whole number")
    return int(environment[name])
