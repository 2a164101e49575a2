"""Blocks for sequences: what is found in the prefix cache, what is new, and what becomes findable."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pageflight.core.config import KVConfig
from pageflight.kv.block_pool import BlockPool
from pageflight.kv.capacity import blocks_for
from pageflight.kv.prefix_cache import PrefixCache, chain_root, extend_chain
from pageflight.sched.sequence import Sequence


class Claim(NamedTuple):
    """Blocks for all known tokens of a sequence, each with a reference; the first `num_shared` are computed already."""

    blocks: list[int]
    num_shared: int


class KVSpace:
    """The pool and, if the configuration wants one, the prefix cache in front of it."""

    def __init__(self, kv: KVConfig) -> None:
        self.block_size = kv.block_size
        self.cache = PrefixCache(kv.num_blocks) if kv.prefix_cache else None
        self.pool = self.cache.pool if self.cache is not None else BlockPool(kv.num_blocks)

    def claim(self, sequence: Sequence, headroom: int) -> Claim | None:
        """Blocks for a waiting sequence, or None unless `headroom` free blocks would remain.

        At least its last token stays to be computed: a sampled token needs logits.
        """
        pool, size = self.pool, self.block_size
        if pool.num_free < headroom:
            return None
        num_needed = blocks_for(len(sequence.tokens), size)
        hits: list[int] = []
        if self.cache is not None:
            num_full = (len(sequence.tokens) - 1) // size
            self._extend_digests(sequence, sequence.tokens, num_full)
            hits = self.cache.match(sequence.digests[:num_full])
        num_new = num_needed - len(hits)
        if pool.num_free - pool.num_free_among(hits) - num_new < headroom:
            return None
        pool.acquire(hits)
        return Claim(hits + pool.allocate(num_new), len(hits))

    def fork(self, leader_blocks: list[int], num_prompt: int, headroom: int) -> Claim | None:
        """Blocks for a follower of a computed prompt: all before the last prompt token's are shared, that one is new.

        None unless `headroom` free blocks would remain.
        """
        num_shared = (num_prompt - 1) // self.block_size
        if self.pool.num_free - 1 < headroom:
            return None
        shared = leader_blocks[:num_shared]
        self.pool.acquire(shared)
        return Claim(shared + self.pool.allocate(1), num_shared)

    def register(self, sequence: Sequence, table: NDArray[np.int32], tokens: NDArray[np.int32], num_full: int) -> None:
        """The first `num_full` blocks of a row (its `table` and `tokens`) are computed: let others find them."""
        if self.cache is None:
            return
        self._extend_digests(sequence, tokens, num_full)
        for index in range(sequence.num_registered, num_full):
            self.cache.register(int(table[index]), sequence.digests[index])
        sequence.num_registered = num_full

    def _extend_digests(self, sequence: Sequence, tokens: NDArray[np.int32], num_full: int) -> None:
        digests = sequence.digests
        if len(digests) < num_full:
            request = sequence.request
            parent = digests[-1] if digests else chain_root(request.tenant, request.cache_salt)
            extend_chain(digests, parent, tokens, num_full, self.block_size)

    def check(self, held: Iterable[int]) -> None:
        """Assert that the blocks named by their holders, once per reference, are exactly those that are not free."""
        self.pool.check(held)
        if self.cache is not None:
            self.cache.check()
