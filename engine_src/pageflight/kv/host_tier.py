"""The second level of the cache: slots in host memory, each as large as a block.

What is evicted from the first level is copied out and stays findable by its digest; a sequence that is swapped out has
its blocks here. This module only decides: the copies are handed to the next plan, which makes them before its pass,
first those out of the device's blocks, then those into them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pageflight.core.request import DEFAULT_PRIORITY
from pageflight.kv.prefix_cache import PrefixCache


class HostCopies(NamedTuple):
    """Copies of one plan as pairs. No slot is written twice, no block either."""

    outs: list[tuple[int, int]]  # block, slot
    ins: list[tuple[int, int]]  # slot, block


class HostTier:
    """Slots with reference counts as the device's blocks have: a *pinned* slot has content that somebody counts on."""

    def __init__(self, num_slots: int) -> None:
        self._cache = PrefixCache(num_slots)
        self._outs: dict[int, int] = {}  # slot → block whose content it gets with the next plan
        self._ins: dict[int, int] = {}  # block → slot whose content it gets with the next plan, pinned until then

    @property
    def num_free(self) -> int:
        """Slots that are not pinned."""
        return self._cache.pool.num_free

    def num_free_among(self, slots: Iterable[int]) -> int:
        """How many of `slots` are not pinned, so that pinning them takes away from `num_free`."""
        return self._cache.pool.num_free_among(slots)

    def find(self, digest: bytes) -> int | None:
        """The slot with this content. The caller pins it before anything else is stored."""
        return self._cache.find(digest)

    def pin(self, slots: Iterable[int]) -> None:
        self._cache.pool.acquire(slots)

    def unpin(self, slots: Sequence[int]) -> None:
        """Of a chain, from its first to its last."""
        self._cache.pool.release(slots)

    def save(self, block: int, digest: bytes, priority: int) -> None:
        """The device's `block` is about to be used for something else: keep its content, unless what would have to
        make room for it is worth more."""
        slot, pool = self._cache.find(digest), self._cache.pool
        if slot is not None:
            pool.acquire([slot])  # known already: it counts as used just now
            pool.keep(slot, priority)
        elif pool.num_free and pool.next_priority <= priority:
            slot = self._store(block, digest, priority)
        else:
            return
        pool.release([slot])

    def hold(self, block: int, digest: bytes | None, priority: int = DEFAULT_PRIORITY) -> int:
        """A pinned slot with the content of the device's `block`. The caller has checked `num_free`."""
        slot = None if digest is None else self._cache.find(digest)
        if slot is None:
            return self._store(block, digest, priority)
        self._cache.pool.acquire([slot])
        return slot

    def _store(self, block: int, digest: bytes | None, priority: int) -> int:
        (slot,) = self._cache.pool.allocate(1)
        if digest is not None:
            self._cache.register(slot, digest, priority)
        self._outs[slot] = block
        return slot

    def fetch(self, slot: int, block: int) -> None:
        """The device's `block` gets the content of a pinned slot. The pin passes to the copy."""
        replaced = self._ins.get(block)  # by a holder that was gone before a plan was made
        self._ins[block] = slot
        if replaced is not None:
            self._cache.pool.release([replaced])

    def take_copies(self) -> HostCopies:
        """For the plan that is being made; the slots they come from are not pinned for them any more."""
        outs = [(block, slot) for slot, block in self._outs.items()]
        ins = [(slot, block) for block, slot in self._ins.items()]
        if self._ins:
            self._cache.pool.release(list(self._ins.values()))
        self._outs, self._ins = {}, {}
        return HostCopies(outs, ins)

    def check(self, pinned: Iterable[int]) -> None:
        """Assert that exactly these slots (one entry per pin) and those of copies to come are pinned."""
        self._cache.pool.check([*pinned, *self._ins.values()])
        self._cache.check()
