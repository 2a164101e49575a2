"""Blocks for sequences: what is found in the cache's levels, what is new, and what becomes findable."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pageflight.core.config import KVConfig
from pageflight.core.request import DEFAULT_PRIORITY
from pageflight.kv.block_pool import BlockPool
from pageflight.kv.capacity import blocks_for
from pageflight.kv.host_tier import HostCopies, HostTier
from pageflight.kv.prefix_cache import PrefixCache, chain_root, extend_chain, output_root
from pageflight.sched.costs import Costs
from pageflight.sched.sequence import Sequence, Swapped

_NO_COPIES = HostCopies([], [])


class Claim(NamedTuple):
    """Blocks for all known tokens of a sequence, each with a reference."""

    blocks: list[int]
    num_shared: int  # of the first of them, that the prefix cache knows
    num_computed: int  # tokens whose K/V is there before the next plan's pass
    num_fetched: int = 0  # of the blocks, copied in from the host for that
    was_swapped: bool = False


class KVSpace:
    """The pool and, where the configuration wants them, the prefix cache and the host tier behind it.

    Where the content of a block can be had is one number, a *place*: the block itself, or `~slot` of the host tier.
    `tells_output`: blocks with output tokens are not found by prompts (see `output_root`).
    """

    def __init__(self, kv: KVConfig, costs: Costs, *, tells_output: bool = False) -> None:
        self.block_size, self._tells_output = kv.block_size, tells_output
        self.host = HostTier(kv.num_host_blocks) if kv.num_host_blocks else None
        on_evict = self.host.save if self.host is not None else None
        self.cache = PrefixCache(kv.num_blocks, on_evict) if kv.prefix_cache else None
        self.pool = self.cache.pool if self.cache is not None else BlockPool(kv.num_blocks)
        self._costs = costs

    # ---- coming -------------------------------------------------------------------------------------------------

    def num_shareable(self, sequence: Sequence) -> int:
        """Of a sequence without a row: how many of its first blocks it may have from others.

        At least its last token stays to be computed: a sampled token needs logits.
        """
        return (len(sequence.tokens) - 1) // self.block_size

    def find(self, sequence: Sequence) -> list[int]:
        """Places of computed blocks for the beginning of a sequence without a row. Good until the next allocation."""
        if sequence.swapped is not None:
            return self._find_swapped(sequence, sequence.swapped)
        cache, host, places = self.cache, self.host, []
        if cache is None:
            return []
        self._extend_digests(sequence, sequence.tokens, len(sequence.tokens) // self.block_size)
        if host is not None and not self._costs.is_copying_cheaper(1, self.block_size):
            host = None
        for digest in sequence.digests[: self.num_shareable(sequence)]:
            block = cache.find(digest)
            if block is None:
                slot = host.find(digest) if host is not None else None
                if slot is None:
                    break
                block = ~slot
            places.append(block)
        return places

    def _find_swapped(self, sequence: Sequence, swapped: Swapped) -> list[int]:
        """Its own slots; but a block of equal content that is still on the device need not be copied."""
        places = [~slot for slot in swapped.slots]
        if self.cache is not None:
            for index, digest in enumerate(sequence.digests[: swapped.num_known]):
                block = self.cache.find(digest)
                if block is not None:
                    places[index] = block
        return places

    def num_new(self, sequence: Sequence, places: list[int]) -> int:
        """Blocks that `sequence` takes away from the free ones when it starts."""
        here = [place for place in places if place >= 0]
        return blocks_for(len(sequence.tokens), self.block_size) - len(here) + self.pool.num_free_among(here)

    def claim(self, sequence: Sequence, places: list[int], headroom: int) -> Claim | None:
        """Blocks for a waiting sequence, those that were found first, or None unless `headroom` would remain free."""
        pool, host, swapped = self.pool, self.host, sequence.swapped
        if pool.num_free < headroom:
            return None
        here = [place for place in places if place >= 0]
        num_new = blocks_for(len(sequence.tokens), self.block_size) - len(here)
        if pool.num_free - pool.num_free_among(here) - num_new < headroom:
            return None
        pool.acquire(here)
        num_fetched, num_shared = len(places) - len(here), len(places)
        if num_fetched:
            assert host is not None
            host.pin([~place for place in places if place < 0])  # the allocation may store others
        new = pool.allocate(num_new)
        if num_fetched:
            self._fetch(sequence, places, new[:num_fetched])
        num_computed = num_shared * self.block_size
        if swapped is not None:
            num_computed, num_shared = swapped.num_tokens, swapped.num_known
            self.drop_swapped(sequence)
        if sequence.request.kv_retention_priority is not None and self.cache is not None:
            self._mark(here, sequence.request.kv_retention_priority)
        return Claim(_merge(places, new), num_shared, num_computed, num_fetched, swapped is not None)

    def _fetch(self, sequence: Sequence, places: list[int], new: list[int]) -> None:
        """Have the content of the places on the host copied into `new` blocks."""
        assert self.host is not None
        num_known = len(places) if sequence.swapped is None else sequence.swapped.num_known
        blocks = iter(new)
        for index, place in enumerate(places):
            if place >= 0:
                continue
            block = next(blocks)
            self.host.fetch(~place, block)
            if self.cache is not None and index < num_known:
                self.cache.register(block, sequence.digests[index], self._priority(sequence))

    def fork(self, leader_blocks: list[int], num_prompt: int, headroom: int) -> Claim | None:
        """Blocks for a follower of a computed prompt: all before the last prompt token's are shared, that one is new.

        None unless `headroom` free blocks would remain.
        """
        num_shared = (num_prompt - 1) // self.block_size
        if self.pool.num_free - 1 < headroom:
            return None
        shared = leader_blocks[:num_shared]
        self.pool.acquire(shared)
        return Claim(shared + self.pool.allocate(1), num_shared, num_prompt)

    def take_host_copies(self) -> HostCopies:
        """What the plan that is being made must copy."""
        return self.host.take_copies() if self.host is not None else _NO_COPIES

    # ---- being there --------------------------------------------------------------------------------------------

    def register(
        self, sequence: Sequence, table: NDArray[np.int32], tokens: NDArray[np.int32], num_full: int
    ) -> list[bytes]:
        """The first `num_full` blocks of a row (its `table` and `tokens`) are computed: let others find them.

        The digests of those that were not computed before.
        """
        assert self.cache is not None
        self._extend_digests(sequence, tokens, num_full)
        first, sequence.num_registered = sequence.num_registered, num_full
        new, priority = sequence.digests[first:num_full], self._priority(sequence)
        for index, digest in enumerate(new, first):
            self.cache.register(int(table[index]), digest, priority)
        return new

    def _mark(self, blocks: Iterable[int], priority: int) -> None:
        """A request that says how long its blocks are worth keeping says so of those it has found, too."""
        for block in blocks:
            if self.pool.is_kept(block):
                self.pool.keep(block, priority)

    @staticmethod
    def _priority(sequence: Sequence) -> int:
        priority = sequence.request.kv_retention_priority
        return DEFAULT_PRIORITY if priority is None else priority

    def _extend_digests(self, sequence: Sequence, tokens: NDArray[np.int32], num_full: int) -> None:
        digests = sequence.digests
        num_known = len(digests)
        if num_known >= num_full:
            return
        request = sequence.request
        parent = digests[-1] if num_known else chain_root(request.tenant, request.cache_salt)
        num_plain = sequence.num_prompt // self.block_size if self._tells_output else num_full
        if num_known < num_plain:
            num_known = num_plain if num_plain < num_full else num_full
            parent = extend_chain(digests, parent, tokens, num_known, self.block_size)
        if num_known < num_full:
            if num_known == num_plain:
                parent = output_root(parent, sequence.num_prompt)
            extend_chain(digests, parent, tokens, num_full, self.block_size)

    # ---- being swapped out --------------------------------------------------------------------------------------

    def swap_out(self, sequence: Sequence, blocks: list[int], num_tokens: int) -> bool:
        """Keep the computed `num_tokens` of a running sequence on the host, if there is room and copying is cheaper.

        `blocks` are those of its row. They are its caller's to release.
        """
        host, num_used = self.host, blocks_for(num_tokens, self.block_size)
        if host is None or not num_used:
            return False
        blocks = blocks[:num_used]
        num_known = min(num_used, sequence.num_registered) if self.cache is not None else 0
        found = [slot for digest in sequence.digests[:num_known] if (slot := host.find(digest)) is not None]
        num_out = num_used - len(found)
        num_own = sum(1 for block in blocks if self.pool.refs(block) == 1)  # likely to be lost
        if host.num_free - host.num_free_among(found) < num_out:
            return False
        num_lost = num_tokens - (num_used - num_own) * self.block_size
        if not self._costs.is_copying_cheaper(num_out + num_own, num_lost):
            return False
        host.pin(found)  # storing others must not take them
        slots = [
            host.hold(block, sequence.digests[index] if index < num_known else None, self._priority(sequence))
            for index, block in enumerate(blocks)
        ]
        host.unpin(found)
        sequence.swapped = Swapped(slots, num_tokens, num_known)
        return True

    def num_swappable(self) -> int:
        """Blocks of sequences to be preempted that would find room on the host, and be worth their copies."""
        if self.host is None or not self._costs.is_copying_cheaper(2, self.block_size):
            return 0
        return self.host.num_free

    def drop_swapped(self, sequence: Sequence) -> None:
        """A sequence that was swapped out needs its slots no longer; others may still find what is known of them."""
        swapped, sequence.swapped = sequence.swapped, None
        if swapped is not None:
            assert self.host is not None
            self.host.unpin(swapped.slots)

    def check(self, held: Iterable[int], swapped: Iterable[Swapped]) -> None:
        """Assert that the blocks named by their holders, once per reference, are exactly those that are not free.

        `swapped`: of all open sequences that have one.
        """
        self.pool.check(held)
        if self.cache is not None:
            self.cache.check()
        if self.host is not None:
            self.host.check(slot for each in swapped for slot in each.slots)


def _merge(places: list[int], new: list[int]) -> list[int]:
    """A row's blocks: those that were found on the device, `new` ones for the other places and behind them."""
    fresh = iter(new)
    return [place if place >= 0 else next(fresh) for place in places] + list(fresh)
