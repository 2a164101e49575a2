from __future__ import annotations

import numpy as np
import pytest

from pageflight.kv.prefix_cache import PrefixCache, chain_root, extend_chain

SIZE = 4


def digests_of(ids: list[int], *, tenant: str = "", cache_salt: str = "") -> list[bytes]:
    digests: list[bytes] = []
    extend_chain(digests, chain_root(tenant, cache_salt), np.array(ids, np.int32), len(ids) // SIZE, SIZE)
    return digests


def match(cache: PrefixCache, digests: list[bytes]) -> list[int]:
    """Blocks of the longest known beginning of the chain."""
    blocks = [cache.find(digest) for digest in digests]
    return [block for block in blocks[: blocks.index(None) if None in blocks else None] if block is not None]


def test_a_known_beginning_is_found_and_nothing_beyond_it() -> None:
    """Looking blocks up one by one found a later block whose predecessors differed."""
    cache = PrefixCache(8)
    digests = digests_of([1, 2, 3, 4, 5, 6, 7, 8])
    blocks = cache.pool.allocate(2)
    for block, digest in zip(blocks, digests, strict=True):
        cache.register(block, digest)
    assert match(cache, digests_of([1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9])) == blocks
    assert match(cache, digests_of([1, 2, 3, 4, 0, 0, 0, 0])) == blocks[:1]
    assert match(cache, digests_of([9, 9, 9, 9, 5, 6, 7, 8])) == []
    cache.check()


def test_equal_tokens_after_different_beginnings_have_different_digests() -> None:
    """Hashing a block's own tokens alone gave one context's K/V to another."""
    assert digests_of([1, 1, 1, 1, 5, 6, 7, 8])[1] != digests_of([2, 2, 2, 2, 5, 6, 7, 8])[1]


@pytest.mark.parametrize(
    ("left", "right"),
    [(("a", ""), ("", "a")), (("a", "b"), ("ab", "")), (("a", ""), ("b", "")), (("", ""), ("", "salt"))],
)
def test_tenant_and_salt_separate_equal_prompts(left: tuple[str, str], right: tuple[str, str]) -> None:
    """Joining tenant and salt without a border let tenant `ab` find what tenant `a` with salt `b` had computed."""
    ids = [1, 2, 3, 4]
    one = digests_of(ids, tenant=left[0], cache_salt=left[1])
    other = digests_of(ids, tenant=right[0], cache_salt=right[1])
    assert one != other


def test_growing_a_chain_in_pieces_gives_the_same_digests() -> None:
    """A sequence that was preempted and came back hashed from a wrong parent and never hit its own blocks."""
    ids = np.arange(16, dtype=np.int32)
    grown: list[bytes] = []
    for num_blocks in (1, 3, 4):
        extend_chain(grown, grown[-1] if grown else chain_root("", ""), ids, num_blocks, SIZE)
    assert grown == digests_of(ids.tolist())


def test_a_second_block_of_equal_content_stays_unknown() -> None:
    """Registering the copy moved the digest to it; when the copy was reused, the original stayed kept for ever."""
    cache = PrefixCache(2)
    first, second = cache.pool.allocate(2)
    (digest,) = digests_of([1, 2, 3, 4])
    cache.register(first, digest)
    cache.register(second, digest)
    assert match(cache, [digest]) == [first] and not cache.pool.is_kept(second)
    cache.check()


def test_a_reused_block_is_not_found_any_more() -> None:
    """The digest of an evicted block pointed to another sequence's K/V."""
    cache = PrefixCache(1)
    (block,) = cache.pool.allocate(1)
    (digest,) = digests_of([1, 2, 3, 4])
    cache.register(block, digest)
    cache.pool.release([block])
    assert match(cache, [digest]) == [block]
    cache.pool.allocate(1)
    assert match(cache, [digest]) == [] and len(cache) == 0
    cache.check()


def test_what_was_used_last_is_kept_longest() -> None:
    """Hits must renew a block: otherwise a popular system prompt ages out at the pace of one-off prompts."""
    cache = PrefixCache(3)
    blocks = cache.pool.allocate(3)
    for block, digest in zip(blocks, digests_of([*range(12)]), strict=True):
        cache.register(block, digest)
    for block in blocks:
        cache.pool.release([block])
    cache.pool.acquire(blocks[:1])
    cache.pool.release(blocks[:1])
    assert cache.pool.allocate(2) == blocks[1:]
