"""The blocks of the K/V cache as ids with reference counts. Every operation on a block costs O(1)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence


class BlockPool:
    """Owns the ids 0 … num_blocks - 1: each is either held (reference count > 0) or free.

    A free block keeps its content until it is handed out again. Blocks that are *kept* (their content can be found by
    the prefix cache) are handed out last, the least recently released first; `on_reuse` is told before one is.
    """

    def __init__(self, num_blocks: int, on_reuse: Callable[[int], None] | None = None) -> None:
        assert num_blocks >= 1, f"num_blocks={num_blocks}"
        self.num_blocks = num_blocks
        self._on_reuse = on_reuse
        self._refs = [0] * num_blocks
        self._kept = bytearray(num_blocks)
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # order of reuse

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out: never used, released, or kept without a holder."""
        return len(self._free)

    def refs(self, block: int) -> int:
        """How many holders `block` has."""
        return self._refs[block]

    def num_free_among(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are free, so that acquiring them takes away from `num_free`."""
        refs = self._refs
        return sum(1 for block in blocks if not refs[block])

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` free blocks, each with one reference. The caller has checked `num_free`."""
        free, kept, refs = self._free, self._kept, self._refs
        assert count <= len(free), f"{count} blocks wanted, {len(free)} free"
        blocks = []
        for _ in range(count):
            block, _none = free.popitem(last=False)
            if kept[block]:
                kept[block] = 0
                if self._on_reuse is not None:
                    self._on_reuse(block)
            refs[block] = 1
            blocks.append(block)
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block; free ones with kept content come back into use."""
        refs = self._refs
        for block in blocks:
            if not refs[block]:
                del self._free[block]
            refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference from each block of a sequence, given from its first to its last.

        They become free in reverse order: a chain of kept blocks is worth nothing without its beginning, so its end is
        reused first.
        """
        refs, free, kept = self._refs, self._free, self._kept
        for block in reversed(blocks):
            count = refs[block] - 1
            assert count >= 0, f"block {block} was released twice"
            refs[block] = count
            if not count:
                free[block] = None
                if not kept[block]:
                    free.move_to_end(block, last=False)

    def keep(self, block: int) -> None:
        """Mark a held block's content as worth finding again after its release."""
        assert self._refs[block], f"block {block} is free and cannot be kept"
        self._kept[block] = 1

    def is_kept(self, block: int) -> bool:
        return bool(self._kept[block])

    def check(self, held: Iterable[int] | None = None) -> None:
        """Assert that no block is lost or doubly owned. `held` names the holders' blocks, one entry per reference."""
        for block, count in enumerate(self._refs):
            assert count >= 0, f"block {block} has {count} references"
            assert (count == 0) == (block in self._free), (
                f"block {block}: {count} references, free={block in self._free}"
            )
        num_held = sum(1 for count in self._refs if count)
        assert num_held + len(self._free) == self.num_blocks, "a block was lost"
        seen_kept = False
        for block in self._free:
            assert self._kept[block] or not seen_kept, f"block {block} has no content but would be reused late"
            seen_kept = seen_kept or bool(self._kept[block])
        if held is not None:
            counts = [0] * self.num_blocks
            for block in held:
                counts[block] += 1
            wrong = [b for b in range(self.num_blocks) if counts[b] != self._refs[b]]
            assert not wrong, f"blocks {wrong[:8]}: holders do not agree with reference counts"
