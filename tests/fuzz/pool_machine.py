"""The block pool against a model of it that is a list."""

from __future__ import annotations

from typing import Any

from counted import Counted
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from pageflight.kv.block_pool import BlockPool

PRIORITIES = st.sampled_from([0, 35, 35, 80, 100])


class PoolMachine(Counted):
    """Holders take, share and release blocks; the pool hands out the right one every time.

    The model: empty free blocks in a stack, kept ones in the order of their release.
    """

    @initialize(num_blocks=st.integers(1, 12))
    def build(self, num_blocks: int) -> None:
        self.reused: list[int] = []
        self.pool = BlockPool(num_blocks, on_reuse=self.reused.append)
        self.empty = list(reversed(range(num_blocks)))  # the last is handed out next
        self.kept_free: list[int] = []  # the first of the lowest priority is handed out next
        self.priority: dict[int, int] = {}  # of blocks whose content is kept
        self.holders: list[list[int]] = []

    def next_blocks(self, count: int) -> list[int]:
        """What the model hands out."""
        blocks = []
        for _ in range(count):
            if self.empty:
                blocks.append(self.empty.pop())
            else:
                lowest = min(self.priority[block] for block in self.kept_free)
                block = next(block for block in self.kept_free if self.priority[block] == lowest)
                self.kept_free.remove(block)
                del self.priority[block]
                blocks.append(block)
        return blocks

    @rule(data=st.data())
    def allocate(self, data: Any) -> None:
        count = data.draw(st.integers(0, self.pool.num_free))
        kept = dict(self.priority)
        expected = self.next_blocks(count)
        assert self.pool.allocate(count) == expected
        assert self.reused == [block for block in expected if block in kept]
        self.reused.clear()
        if expected:
            self.holders.append(expected)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), priority=PRIORITIES)
    def keep(self, data: Any, priority: int) -> None:
        """A held block is worth finding again, from now on or with another priority."""
        block = data.draw(st.sampled_from(sorted({block for blocks in self.holders for block in blocks})))
        self.pool.keep(block, priority)
        self.priority[block] = priority

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: Any) -> None:
        blocks = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.release(blocks)
        held = {block for others in self.holders for block in others}
        for block in reversed(blocks):
            if block not in held:
                (self.kept_free if block in self.priority else self.empty).append(block)

    @precondition(lambda self: self.holders or self.kept_free)
    @rule(data=st.data())
    def share(self, data: Any) -> None:
        """Another holder of blocks that are held, or free with content."""
        known = sorted({block for blocks in self.holders for block in blocks} | set(self.kept_free))
        blocks = data.draw(st.lists(st.sampled_from(known), min_size=1, unique=True))
        assert self.pool.num_free_among(blocks) == len(set(blocks) & set(self.kept_free))
        self.pool.acquire(blocks)
        self.kept_free = [block for block in self.kept_free if block not in blocks]
        self.holders.append(blocks)

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def model_and_pool_agree(self) -> None:
        held = [block for blocks in self.holders for block in blocks]
        self.pool.check(held)
        assert self.pool.num_free == len(self.empty) + len(self.kept_free)
        for block in range(self.pool.num_blocks):
            assert self.pool.refs(block) == held.count(block)
            assert self.pool.is_kept(block) == (block in self.priority)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for blocks in self.holders:
                self.pool.release(blocks)
            assert self.pool.num_free == self.pool.num_blocks
