from __future__ import annotations

from pageflight.kv.host_tier import HostTier
from pageflight.kv.prefix_cache import PrefixCache


def two_levels(num_blocks: int, num_slots: int) -> tuple[PrefixCache, HostTier]:
    host = HostTier(num_slots)
    return PrefixCache(num_blocks, host.save), host


def put(cache: PrefixCache, digest: bytes, priority: int = 35) -> int:
    """A computed block with this digest that nobody holds any more."""
    (block,) = cache.pool.allocate(1)
    cache.register(block, digest, priority)
    cache.pool.release([block])
    return block


def test_what_the_first_level_evicts_is_found_in_the_second() -> None:
    cache, host = two_levels(1, 2)
    block = put(cache, b"one")
    assert host.take_copies() == ([], [])
    put(cache, b"two")
    slot = host.find(b"one")
    assert slot is not None and cache.find(b"one") is None
    assert host.take_copies() == ([(block, slot)], [])
    host.check([])


def test_what_is_on_the_host_already_is_not_copied_again() -> None:
    """A block that came from the host and is evicted again cost a second copy of the same content."""
    cache, host = two_levels(1, 2)
    put(cache, b"one")
    put(cache, b"two")
    host.take_copies()
    put(cache, b"one")
    copies = host.take_copies()
    assert [slot for _block, slot in copies.outs] == [host.find(b"two")]
    put(cache, b"three")
    assert host.take_copies().outs == [] and host.find(b"one") is not None


def test_a_slot_that_is_to_be_copied_in_is_not_given_to_others_before() -> None:
    """Fetching a block evicted another one, which took the very slot that was to be fetched from."""
    cache, host = two_levels(1, 1)
    put(cache, b"one")
    put(cache, b"two")
    host.take_copies()
    slot = host.find(b"one")
    assert slot is not None
    host.pin([slot])
    (block,) = cache.pool.allocate(1)  # evicts `two`, for which no slot is free
    host.fetch(slot, block)
    host.check([])
    assert host.find(b"one") == slot and host.find(b"two") is None
    assert host.take_copies() == ([], [(slot, block)])
    host.check([])


def test_two_sequences_swapped_out_share_the_slot_of_a_common_block() -> None:
    cache, host = two_levels(2, 2)
    (block,) = cache.pool.allocate(1)
    cache.register(block, b"one")
    first, second = host.hold(block, b"one"), host.hold(block, b"one")
    assert first == second and host.take_copies().outs == [(block, first)]
    host.unpin([first])
    host.check([first])
    host.unpin([first])
    assert host.num_free == 2 and host.find(b"one") == first, "the content stays for others"


def test_a_block_without_a_digest_leaves_no_trace_after_its_owner() -> None:
    _cache, host = two_levels(1, 2)
    slot = host.hold(0, None)
    assert host.num_free == 1
    host.unpin([slot])
    assert host.num_free == 2
    host.check([])


def test_what_is_worth_less_than_all_that_is_stored_is_not_stored() -> None:
    cache, host = two_levels(1, 1)
    put(cache, b"precious", priority=90)
    put(cache, b"cheap", priority=10)
    put(cache, b"usual")
    assert host.find(b"precious") is not None and host.find(b"cheap") is None
    put(cache, b"more", priority=90)
    put(cache, b"last")
    assert host.find(b"more") is not None and host.find(b"precious") is None
    assert [slot for _block, slot in host.take_copies().outs] == [0], "one copy: the slot's later content"
