"""The prefix cache against a model that keeps whole contexts instead of digests."""

from __future__ import annotations

from typing import Any

import numpy as np
from counted import Counted
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from pageflight.kv.prefix_cache import PrefixCache, chain_root, extend_chain

Context = tuple[str, str, tuple[int, ...]]
"""Tenant, salt and all tokens up to a block's end."""

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=10)  # few different ones, so that contexts meet


class CacheMachine(Counted):
    """Sequences come, find what is known, compute the rest, and go. Nothing is found that was not computed so."""

    @initialize(num_blocks=st.integers(1, 10), block_size=st.integers(1, 3))
    def build(self, num_blocks: int, block_size: int) -> None:
        self.cache = PrefixCache(num_blocks, on_evict=self.evicted)
        self.block_size = block_size
        self.known: dict[Context, int] = {}
        self.digest_of: dict[int, bytes] = {}
        self.holders: list[list[int]] = []

    def evicted(self, block: int, digest: bytes, priority: int) -> None:
        """The cache forgets a block: it must be one that nobody holds, named by the digest it has."""
        assert all(block not in blocks for blocks in self.holders), f"block {block} is held and was evicted"
        assert self.digest_of.pop(block) == digest
        self.known = {context: other for context, other in self.known.items() if other != block}

    @rule(tokens=TOKENS, tenant=st.sampled_from(["", "", "a"]), salt=st.sampled_from(["", "", "s"]))
    def admit(self, tokens: list[int], tenant: str, salt: str) -> None:
        """A prompt: what is known of it is shared, the rest gets blocks and is computed."""
        size, pool = self.block_size, self.cache.pool
        num_full = len(tokens) // size
        digests: list[bytes] = []
        extend_chain(digests, chain_root(tenant, salt), np.array(tokens, np.int32), num_full, size)
        contexts = [(tenant, salt, tuple(tokens[: (index + 1) * size])) for index in range(num_full)]
        found = [self.cache.find(digest) for digest in digests]
        assert found == [self.known.get(context) for context in contexts]
        hits = []
        for block in found:
            if block is None:
                break
            hits.append(block)
        num_new = num_full - len(hits)
        if pool.num_free - pool.num_free_among(hits) < num_new:
            return
        pool.acquire(hits)
        self.holders.append(hits)
        blocks = hits + pool.allocate(num_new)
        self.holders[-1] = blocks
        for index in range(len(hits), num_full):
            is_first = contexts[index] not in self.known
            self.cache.register(blocks[index], digests[index])
            if is_first:
                self.known[contexts[index]] = blocks[index]
                self.digest_of[blocks[index]] = digests[index]

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def leave(self, data: Any) -> None:
        self.cache.pool.release(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @precondition(lambda self: hasattr(self, "cache"))
    @invariant()
    def model_and_cache_agree(self) -> None:
        self.cache.check()
        self.cache.pool.check([block for blocks in self.holders for block in blocks])
        assert len(self.cache) == len(self.known)
