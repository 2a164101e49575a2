"""What ranks of one model tell each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from pageflight.models.sharding import Shard

if TYPE_CHECKING:
    from torch import Tensor


class Communicator(Protocol):
    """One rank's line to the others. All ranks call the same methods in the same order, with the same shapes."""

    shard: Shard

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`, which may be overwritten."""

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's `x` [...], by rank: [size, ...]. The same bits on all ranks."""

    def least(self, number: int) -> int:
        """The smallest of every rank's `number`."""
