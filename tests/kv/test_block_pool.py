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


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release", "keep"]), st.integers(0, 9)), max_size=60))
def test_any_order_of_operations_keeps_every_block_accounted_for(operations: list[tuple[str, int]]) -> None:
    """Reference counts, the free list and the kept marks are three records of the same facts."""
    pool = BlockPool(5)
    held: list[int] = []
    for name, number in operations:
        if name == "allocate" and number <= pool.num_free:
            held += pool.allocate(number)
        elif held and name == "share":
            held.append(held[number % len(held)])
            pool.acquire(held[-1:])
        elif held and name == "release":
            pool.release([held.pop(number % len(held))])
        elif held and name == "keep":
            pool.keep(held[number % len(held)])
        pool.check(held)
