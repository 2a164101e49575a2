"""The blocks of one level of the K/V cache as ids with reference counts. Every operation on a block costs O(1)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from pageflight.core.request import DEFAULT_PRIORITY, MAX_PRIORITY

_EMPTY = 0  # level of blocks without content; level 1 + priority holds the kept ones of that priority


class BlockPool:
    """Owns the ids 0 … num_blocks - 1: each is either held (reference count > 0) or free.

    A free block keeps its content until it is handed out again. Blocks without content worth *keeping* (what can be
    found by the prefix cache) are handed out first, then kept ones: those of the lowest priority, of them the least
    recently released. `on_reuse` is told before a kept one is handed out.
    """

    def __init__(self, num_blocks: int, on_reuse: Callable[[int], None] | None = None) -> None:
        assert num_blocks >= 1, f"num_blocks={num_blocks}"
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        """Blocks that can be handed out: never used, released, or kept without a holder."""
        self._on_reuse = on_reuse
        self._refs = [0] * num_blocks
        self._level_of = [_EMPTY] * num_blocks
        self._free: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(MAX_PRIORITY + 2)]
        self._free[_EMPTY] = OrderedDict.fromkeys(range(num_blocks - 1, -1, -1))  # the end is handed out first
        self._levels = 1 << _EMPTY  # bit l: level l has free blocks

    def refs(self, block: int) -> int:
        """How many holders `block` has."""
        return self._refs[block]

    def num_free_among(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are free, so that acquiring them takes away from `num_free`."""
        refs = self._refs
        return sum(1 for block in blocks if not refs[block])

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` free blocks, each with one reference. The caller has checked `num_free`."""
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        refs, blocks = self._refs, []
        for _ in range(count):
            level = self._lowest_level
            free = self._free[level]
            block, _none = free.popitem(last=level == _EMPTY)
            if not free:
                self._levels &= ~(1 << level)
            if level != _EMPTY:
                if self._on_reuse is not None:
                    self._on_reuse(block)
                self._level_of[block] = _EMPTY
            refs[block] = 1
            blocks.append(block)
        self.num_free -= count
        return blocks

    @property
    def _lowest_level(self) -> int:
        return (self._levels & -self._levels).bit_length() - 1

    @property
    def next_priority(self) -> int:
        """Of the block that would be handed out next; -1 if that one has no content. At least one is free."""
        assert self.num_free, "no block is free"
        return self._lowest_level - 1

    def acquire(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block; free ones with kept content come back into use."""
        refs = self._refs
        for block in blocks:
            if not refs[block]:
                self._take(block)
            refs[block] += 1

    def _take(self, block: int) -> None:
        """`block` leaves its free list."""
        level = self._level_of[block]
        free = self._free[level]
        del free[block]
        self.num_free -= 1
        if not free:
            self._levels &= ~(1 << level)

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference from each block of a sequence, given from its first to its last.

        They become free in reverse order: a chain of kept blocks is worth nothing without its beginning, so its end is
        reused first.
        """
        refs, levels = self._refs, self._level_of
        for block in reversed(blocks):
            count = refs[block] - 1
            assert count >= 0, f"block {block} was released twice"
            refs[block] = count
            if not count:
                level = levels[block]
                self._free[level][block] = None
                self._levels |= 1 << level
                self.num_free += 1

    def keep(self, block: int, priority: int = DEFAULT_PRIORITY) -> None:
        """A held block's content is worth finding again after its release, as long as `priority` says."""
        assert self._refs[block], f"block {block} is free and cannot be kept"
        assert 0 <= priority <= MAX_PRIORITY
        self._level_of[block] = 1 + priority

    def is_kept(self, block: int) -> bool:
        return self._level_of[block] != _EMPTY

    def priority(self, block: int) -> int:
        """Of a kept block."""
        assert self._level_of[block] != _EMPTY
        return self._level_of[block] - 1

    def check(self, held: Iterable[int] | None = None) -> None:
        """Assert that no block is lost or doubly owned. `held` names the holders' blocks, one entry per reference."""
        free = [(level, block) for level, blocks in enumerate(self._free) for block in blocks]
        assert len(free) == len({block for _level, block in free}) == self.num_free, "a free block is lost or doubled"
        for level, block in free:
            assert level == self._level_of[block], f"block {block} would be reused at the wrong time"
            assert not self._refs[block], f"block {block} is free with {self._refs[block]} references"
        assert sum(1 for count in self._refs if count) + len(free) == self.num_blocks, "a block was lost"
        assert self._levels == sum(1 << level for level in {level for level, _block in free})
        if held is not None:
            counts = [0] * self.num_blocks
            for block in held:
                counts[block] += 1
            wrong = [b for b in range(self.num_blocks) if counts[b] != self._refs[b]]
            assert not wrong, f"blocks {wrong[:8]}: holders do not agree with reference counts"
