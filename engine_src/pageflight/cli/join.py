"""`pageflight join`: this machine's ranks of a model that is served on another machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from pageflight.cli.console import tell
from pageflight.cli.errors import CommandError
from pageflight.cli.inspect_repository import find_engines
from pageflight.cli.joined_ranks import Joining, keep_joined
from pageflight.cli.machines import machines_of
from pageflight.cli.serve import terminated_like_interrupted
from pageflight.core.config import EngineConfig
from pageflight.core.manifest import MANIFEST_NAME
from pageflight.ranks.dialing import parse_leader
from pageflight.ranks.key import rank_key
from pageflight.ranks.network import gone_s

LEADER_TIMEOUT_S = 600.0


def join(
    repository: Annotated[Path, typer.Argument(help="This machine's copy of the model repository, or of its engine.")],
    leader: Annotated[str, typer.Option(help="HOST or HOST:PORT of the machine that serves the model.")],
    node_rank: Annotated[int, typer.Option(help="This machine's number, from 1; the leader's is 0.", min=0)],
    ranks_per_node: Annotated[int, typer.Option(help="Ranks of each machine; 0: as the repository says.", min=0)] = 0,
    leader_timeout_s: Annotated[
        float, typer.Option(help="Seconds without a leader after which the command gives up.", min=0)
    ] = LEADER_TIMEOUT_S,
) -> None:
    """Be one of the machines of a model built with --launcher external, until Ctrl-C.

    Each rank dials in, works until the leader's engine ends, and dials in again. The key that all machines share is in
    $PAGEFLIGHT_RANK_KEY, or in the file that $PAGEFLIGHT_RANK_KEY_FILE names.

    Example:

        pageflight join repositories/demo --leader 10.0.0.1 --node-rank 1
    """
    if (repository / MANIFEST_NAME).is_file():
        if not ranks_per_node:
            raise CommandError(f"{repository} is an engine, and no repository that says more: give --ranks-per-node")
        ranks, port = range(node_rank * ranks_per_node, (node_rank + 1) * ranks_per_node), EngineConfig().rank_port
    else:
        machines = machines_of(repository)
        ranks, port = machines.ranks_of(node_rank), machines.rank_port
        if ranks_per_node not in (0, machines.ranks_per_node):
            raise CommandError(
                f"ranks-per-node={ranks_per_node}: the model was built for {machines.num_ranks} ranks on"
                f" {machines.num_nodes} nodes, {machines.ranks_per_node} each"
            )
    devices = {rank: index for index, rank in enumerate(ranks)}
    join_ranks(repository, parse_leader(leader, port), devices, leader_timeout_s)


def join_ranks(
    repository: Path,
    leader: tuple[str, int],
    devices: Mapping[int, int],
    leader_timeout_s: float = LEADER_TIMEOUT_S,
    *,
    verifies: bool = True,
) -> None:
    """Keep the ranks of `devices` joined until Ctrl-C or SIGTERM; `verifies` as in `Joining`. Raises CommandError,
    ConfigError."""
    rank_key()
    gone_s()
    find_engines(repository)
    joining = Joining(
        engine_dir=repository.resolve(),
        leader=leader,
        devices=devices,
        leader_timeout_s=leader_timeout_s,
        verifies=verifies,
    )
    names = ", ".join(map(str, sorted(devices)))
    tell(f"joining {leader[0]}:{leader[1]} as rank{'s' if len(devices) > 1 else ''} {names}; Ctrl-C ends it")
    with terminated_like_interrupted():
        try:
            keep_joined(joining, tell)
        except KeyboardInterrupt:
            raise typer.Exit(0) from None
