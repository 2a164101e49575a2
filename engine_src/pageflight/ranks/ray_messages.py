"""What a core and its Ray driver tell each other, msgpack, one message each; and what is wanted of a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec


class Wanted(msgspec.Struct, tag=1, frozen=True, kw_only=True):
    """The core's first words: machines, and of each of them `ranks_per_node` times `amount` of a resource of Ray's."""

    address: str
    num_nodes: int
    ranks_per_node: int
    resource: str
    amount: int
    wait_s: float

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray is to set aside on each machine."""
        return {self.resource: float(self.ranks_per_node * self.amount)}


class Start(msgspec.Struct, tag=2, frozen=True):
    """The core's: start these ranks, with this command line after `python -m`, and this in their environments."""

    commands: Mapping[int, tuple[str, ...]]
    environment: dict[str, str]


class Kill(msgspec.Struct, tag=3, frozen=True):
    """The core's."""

    rank: int


class Waiting(msgspec.Struct, tag=4, frozen=True):
    """The driver's: what it waits for, in words."""

    words: str


class Placed(msgspec.Struct, tag=5, frozen=True):
    """The driver's: there is room. Addresses of the machines, this one first; and the GPU that the first rank has, as
    Ray names it, where it has one."""

    addresses: tuple[str, ...]
    gpu: str = ""


class Over(msgspec.Struct, tag=6, frozen=True):
    """The driver's: a rank has ended; `return_code` as `subprocess` has it, None where nobody knows."""

    rank: int
    words: str
    return_code: int | None = None


class Refused(msgspec.Struct, tag=7, frozen=True):
    """The driver's last words: class name and message of an error."""

    error: str
    message: str


ToDriver = Wanted | Start | Kill
FromDriver = Waiting | Placed | Over | Refused
encode = msgspec.msgpack.Encoder().encode
decode_to_driver = msgspec.msgpack.Decoder[ToDriver](ToDriver).decode
decode_from_driver = msgspec.msgpack.Decoder[FromDriver](FromDriver).decode


class Machine(msgspec.Struct, frozen=True):
    """One of a cluster: how much of the resource it has, and how much of that is free."""

    address: str
    total: float
    free: float


def shortage(wanted: Wanted, here: str, machines: Sequence[Machine]) -> str:
    """What is wanted and what there is, in words. `here`: the address of the core's machine."""
    each = f"{wanted.bundle[wanted.resource]:g} {wanted.resource}"
    if wanted.num_nodes == 1:
        wish = f"{each} free on this machine ({here})"
    else:
        wish = f"{wanted.num_nodes} machines, this one ({here}) among them, with {each} free each"
    found = ", ".join(f"{m.address} with {m.free:g} of {m.total:g} {wanted.resource} free" for m in machines)
    return f"wanted are {wish}; the Ray cluster has {found or 'no machine'}"
