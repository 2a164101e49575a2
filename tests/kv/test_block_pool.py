from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageflight.kv.block_pool import BlockPool


def test_a_released_block_without_content_is_reused_before_cached_ones() -> None:
    """Plain LRU threw cached prompts away while blocks with nothing worth keeping lay free."""
    pool = BlockPool(3)
    first, second, third = pool.allocate(3)
    pool.keep(first)
    pool.release([first])
    pool.release([second, third])
    assert pool.allocate(3) == [second, third, first]
    pool.check([first, second, third])


def test_the_end_of_a_chain_is_reused_before_its_beginning() -> None:
    """Releasing front to back evicted the first block first, which made every later block of the chain useless."""
    pool = BlockPool(3)
    chain = pool.allocate(3)
    for block in chain:
        pool.keep(block)
    pool.release(chain)
    assert pool.allocate(3) == chain[::-1]


def test_reuse_of_a_cached_block_is_announced_once_and_before_it_is_handed_out() -> None:
    """The prefix cache kept a digest of a block that another sequence was already writing to."""
    reused: list[int] = []
    pool = BlockPool(1, on_reuse=reused.append)
    (block,) = pool.allocate(1)
    pool.keep(block)
    pool.release([block])
    assert reused == []
    pool.allocate(1)
    assert reused == [block] and not pool.is_kept(block)
    pool.release([block])
    pool.allocate(1)
    assert reused == [block]


def test_a_shared_block_is_free_only_after_its_last_holder() -> None:
    """The first of two sequences that ended took the common prompt away from the other."""
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.acquire([block])
    pool.release([block])
    assert pool.num_free == 1 and pool.refs(block) == 1
    pool.release([block])
    assert pool.num_free == 2


def test_releasing_twice_and_taking_too_many_fail() -> None:
    """A double free put the same block into the free list twice and two sequences got it."""
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    with pytest.raises(AssertionError, match="0 free"):
        pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks[:1])


def test_check_finds_a_block_that_its_holder_forgot() -> None:
    """A check that compares the pool only with itself cannot see a leak."""
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.check(blocks)
    with pytest.raises(AssertionError, match="holders"):
        pool.check(blocks[:1])


def test_blocks_of_low_priority_are_reused_first_whatever_was_released_last() -> None:
    """A system prompt that its owner wants kept aged out at the pace of one-off prompts."""
    pool = BlockPool(4)
    high, low, usual, empty = pool.allocate(4)
    for block, priority in ((high, 100), (low, 0), (usual, 35)):
        pool.keep(block, priority)
        pool.release([block])
    pool.release([empty])
    order = []
    for _ in range(4):
        order.append((pool.next_priority, *pool.allocate(1)))
    assert order == [(-1, empty), (0, low), (35, usual), (100, high)]


def test_a_priority_can_be_raised_and_lowered_while_a_block_is_held() -> None:
    pool = BlockPool(2)
    one, other = pool.allocate(2)
    for block in (one, other):
        pool.keep(block)
    pool.keep(one, 36)
    pool.release([one, other])
    pool.acquire([one])
    pool.keep(one, 34)
    pool.release([one])
    assert pool.allocate(2) == [one, other]


class Model:
    """The pool as its text describes it: a list of free blocks, searched from end to end."""

    def __init__(self, num_blocks: int) -> None:
        self.free = [(-1, -block, block) for block in range(num_blocks)]  # priority, order within it, block
        self.refs = [0] * num_blocks
        self.priority = [-1] * num_blocks
        self.clock = 0

    def allocate(self) -> tuple[int, bool]:
        """The block that is reused next, and whether it had content."""
        lowest = min(priority for priority, _order, _block in self.free)
        among = [entry for entry in self.free if entry[0] == lowest]
        entry = max(among) if lowest < 0 else min(among)  # what is warm, or what was used longest ago
        self.free.remove(entry)
        block, was_kept = entry[2], lowest >= 0
        self.refs[block], self.priority[block] = 1, -1
        return block, was_kept

    def release(self, block: int) -> None:
        self.refs[block] -= 1
        if not self.refs[block]:
            self.clock += 1
            self.free.append((self.priority[block], self.clock, block))

    def acquire(self, block: int) -> None:
        self.refs[block] += 1
        self.free = [entry for entry in self.free if entry[2] != block]


OPERATIONS = ["allocate", "share", "release", "release", "keep", "come back"]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 9), st.sampled_from([0, 34, 35, 100])), max_size=80)
)
def test_any_order_of_operations_does_what_a_simple_list_would(operations: list[tuple[str, int, int]]) -> None:
    """Reference counts, levels, the bits of levels that have blocks and the count of free ones are one state."""
    reused: list[int] = []
    pool, model = BlockPool(5, on_reuse=reused.append), Model(5)
    held: list[int] = []
    for name, number, priority in operations:
        idle = sorted(block for kept, _order, block in model.free if kept >= 0)
        if name == "allocate" and number <= pool.num_free:
            reused.clear()
            expected = [model.allocate() for _ in range(number)]
            assert pool.allocate(number) == [block for block, _kept in expected]
            assert reused == [block for block, was_kept in expected if was_kept]
            held += [block for block, _kept in expected]
        elif held and name == "share":
            held.append(held[number % len(held)])
            pool.acquire(held[-1:])
            model.acquire(held[-1])
        elif held and name == "release":
            block = held.pop(number % len(held))
            pool.release([block])
            model.release(block)
        elif held and name == "keep":
            block = held[number % len(held)]
            pool.keep(block, priority)
            model.priority[block] = priority
        elif idle and name == "come back":
            held.append(idle[number % len(idle)])
            pool.acquire(held[-1:])
            model.acquire(held[-1])
        pool.check(held)
        assert pool.num_free == len(model.free)
