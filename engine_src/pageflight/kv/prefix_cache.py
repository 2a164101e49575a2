"""Finds blocks whose K/V was computed before, by the chain of everything that led to them.

A full block's digest covers its token ids and the digest of the block before it, so equal digests mean equal contexts.
The chain starts from the tenant and the request's salt: what they separate can never meet. (Chained block hashes as in
vLLM's automatic prefix caching; BLAKE2b because a collision would show one client's context to another.)
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import TYPE_CHECKING

from pageflight.core.request import DEFAULT_PRIORITY
from pageflight.kv.block_pool import BlockPool

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DIGEST_BYTES = 16


def chain_root(tenant: str, cache_salt: str) -> bytes:
    """The digest before the first block: differs for every pair of tenant and salt."""
    name = tenant.encode("utf-8", "surrogatepass")
    salt = cache_salt.encode("utf-8", "surrogatepass")
    return blake2b(len(name).to_bytes(8, "little") + name + salt, digest_size=DIGEST_BYTES).digest()


def output_root(parent: bytes, num_prompt: int) -> bytes:
    """The digest before the first block with output tokens, where it matters how K/V was computed.

    Output tokens are computed one by one, the same tokens in a prompt side by side: kernels may round the two
    differently. So such blocks are found again only by a sequence with the same prompt and the same output.
    """
    return blake2b(parent + num_prompt.to_bytes(8, "little"), digest_size=DIGEST_BYTES, person=b"output").digest()


def extend_chain(
    digests: list[bytes], parent: bytes, token_ids: NDArray[np.int32], num_blocks: int, block_size: int
) -> bytes:
    """Grow `digests` to `num_blocks` entries, for the first full blocks of `token_ids` ([tokens] int32).

    `parent` is the last of `digests`, or the chain's root while there is none. Returns the last digest.
    """
    for index in range(len(digests), num_blocks):
        ids = token_ids[index * block_size : (index + 1) * block_size]
        assert ids.size == block_size, "only full blocks have a digest"
        parent = blake2b(parent + ids.tobytes(), digest_size=DIGEST_BYTES).digest()
        digests.append(parent)
    return parent


class PrefixCache:
    """Digest → block, for full blocks in the pool. Holds no references: the pool reuses what nobody holds.

    `on_evict` gets the block, its digest and its priority before the block is handed out for something else.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int, bytes, int], None] | None = None) -> None:
        self.pool = BlockPool(num_blocks, on_reuse=self._forget)
        self._on_evict = on_evict
        self._block_of: dict[bytes, int] = {}
        self._digest_of: list[bytes | None] = [None] * num_blocks

    def __len__(self) -> int:
        return len(self._block_of)

    def find(self, digest: bytes) -> int | None:
        """The block with this content. The caller acquires it before anything is allocated."""
        return self._block_of.get(digest)

    def register(self, block: int, digest: bytes, priority: int = DEFAULT_PRIORITY) -> None:
        """The held, full, computed `block` has this digest. A second block of equal content stays unknown."""
        if digest in self._block_of:
            return
        assert self._digest_of[block] is None, f"block {block} has a digest already"
        self._block_of[digest] = block
        self._digest_of[block] = digest
        self.pool.keep(block, priority)

    def _forget(self, block: int) -> None:
        digest = self._digest_of[block]
        assert digest is not None
        if self._on_evict is not None:
            self._on_evict(block, digest, self.pool.priority(block))
        del self._block_of[digest]
        self._digest_of[block] = None

    def check(self) -> None:
        """Assert that both directions agree and that exactly the known blocks are kept by the pool."""
        for digest, block in self._block_of.items():
            assert self._digest_of[block] == digest, f"block {block} is known by a digest that is not its own"
        num_known = sum(1 for digest in self._digest_of if digest is not None)
        assert num_known == len(self._block_of), "a block has a digest that does not lead to it"
        for block, known in enumerate(self._digest_of):
            assert self.pool.is_kept(block) == (known is not None), f"block {block}: kept and known disagree"
