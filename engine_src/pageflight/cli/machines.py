"""What a model repository says of the machines that its model runs on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pageflight.cli.errors import CommandError
from pageflight.core.placement import num_ranks, parse_placements


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """Of the engine that ranks of other machines join."""

    num_ranks: int
    num_nodes: int
    rank_port: int

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks // self.num_nodes

    def ranks_of(self, node: int) -> range:
        """Raises CommandError for a number that no machine has."""
        if not 0 <= node < self.num_nodes:
            raise CommandError(f"node-rank={node}: the model was built for nodes={self.num_nodes}, counted from 0")
        return range(node * self.ranks_per_node, (node + 1) * self.ranks_per_node)


def machines_of(repository: Path) -> Machines:
    """Raises CommandError where no model of the repository, or more than one, has launcher `external`."""
    found = [machines for config in sorted(repository.glob("*/config.pbtxt")) if (machines := _machines(config))]
    if len(found) != 1:
        raise CommandError(
            f"{repository} has {len(found) or 'no'} engine{'s' if len(found) > 1 else ''} with launcher external; build"
            " one: pageflight build CHECKPOINT --launcher external --nodes N --tensor-parallel T"
        )
    return found[0]


def _machines(config: Path) -> Machines | None:
    # Imported here: they bring gRPC, which takes a while.
    from google.protobuf import text_format  # type: ignore[import-untyped]
    from tritonclient.grpc import model_config_pb2

    try:
        parsed = text_format.Parse(config.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except (OSError, text_format.ParseError, UnicodeDecodeError) as error:
        raise CommandError(f"{config} cannot be read: {error}") from None
    said = {name: entry.string_value for name, entry in parsed.parameters.items()}
    if said.get("launcher") != "external":
        return None
    try:
        placements = parse_placements(f"{config}: placement", said.get("placement", ""))
        size = int(said["tensor_parallel"])
        if placements:
            size = num_ranks(placements[0].devices, placements[0].tensor_parallel, size)
        machines = Machines(
            num_ranks=size * int(said["pipeline_parallel"]),
            num_nodes=int(said["nodes"]),
            rank_port=int(said["rank_port"]),
        )
        if machines.num_nodes < 1 or machines.num_ranks % machines.num_nodes:
            raise ValueError(f"nodes={machines.num_nodes} must divide the {machines.num_ranks} ranks")
    except (KeyError, ValueError) as error:
        raise CommandError(f"{config}: {error}; build it again") from None
    return machines
