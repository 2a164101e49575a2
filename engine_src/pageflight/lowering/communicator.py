"""What ranks of one model tell each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from pageflight.models.stages import Place

if TYPE_CHECKING:
    from torch import Tensor


class Communicator(Protocol):
    """One rank's line to the others. Who takes part calls the same methods in the same order, with the same shapes."""

    place: Place

    # --- among the ranks of a stage

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`, which may be overwritten."""

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's `x` [...], by rank: [size, ...]. The same bits on all ranks."""

    # --- among all ranks

    def least(self, number: int) -> int:
        """The smallest of every rank's `number`."""

    def total(self, number: int) -> int:
        """The sum of every rank's `number`."""

    # --- between stages, from a rank to the one of the same number

    def pass_on(self, x: Tensor) -> None:
        """Send to the next stage; `x` may still be read later."""

    def take_over(self, x: Tensor) -> Tensor:
        """Wait for what the stage before passes on; fills `x`."""

    def announce(self, results: Tensor) -> None:
        """Send from the last stage to all others; `results` may still be read later."""

    def hear(self, results: Tensor) -> Tensor:
        """Wait for what the last stage announces; fills `results`. May be called by another thread than the rest."""

    def expect(self, results: Tensor) -> Callable[[], object]:
        """The same in two parts: be ready for it now, and wait by a call of what is returned."""
