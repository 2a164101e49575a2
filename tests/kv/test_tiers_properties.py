"""Pool, prefix cache and host tier against a memory that is copied and written as plans would."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pageflight.kv.host_tier import HostTier
from pageflight.kv.prefix_cache import PrefixCache


@dataclass(eq=False)
class Holder:
    """Someone with blocks, or, swapped out, with slots; `contents` is what must be in them when a plan has run."""

    contents: list[bytes]
    known: list[bool]  # whether the cache may find that content
    blocks: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    is_new: bool = True  # the next plan writes its blocks


class TiersMachine(RuleBasedStateMachine):
    """Any order of allocations, hits, swaps and plans: content is where the two levels say it is."""

    @initialize(num_blocks=st.integers(1, 7), num_slots=st.integers(1, 7))
    def build(self, num_blocks: int, num_slots: int) -> None:
        self.host = HostTier(num_slots)
        self.cache = PrefixCache(num_blocks, self.host.save)
        self.on_device: list[bytes | None] = [None] * num_blocks
        self.on_host: list[bytes | None] = [None] * num_slots
        self.holders: list[Holder] = []
        self.num_made = 0
        self.digests: list[bytes] = []

    @rule(count=st.integers(1, 3), known=st.booleans())
    def compute(self, count: int, known: bool) -> None:
        """Somebody computes new content; a plan follows at once or later."""
        if count > self.cache.pool.num_free:
            return
        contents = [b"content %d" % (self.num_made + index) for index in range(count)]
        self.num_made += count
        self.holders.append(Holder(contents, [known] * count, self.cache.pool.allocate(count)))

    @rule()
    def plan(self) -> None:
        """Copies out, copies in, the pass; then what it computed can be found."""
        copies = self.host.take_copies()
        for block, slot in copies.outs:
            self.on_host[slot] = self.on_device[block]
        for slot, block in copies.ins:
            self.on_device[block] = self.on_host[slot]
        for holder in self.holders:
            if not holder.is_new:
                continue
            holder.is_new = False
            for block, content, known in zip(holder.blocks, holder.contents, holder.known, strict=True):
                self.on_device[block] = content
                if known:
                    self.cache.register(block, content)
                    self.digests.append(content)
        self.compare()

    def compare(self) -> None:
        for holder in self.holders:
            assert [self.on_device[block] for block in holder.blocks] == holder.contents[: len(holder.blocks)]
            assert [self.on_host[slot] for slot in holder.slots] == holder.contents[: len(holder.slots)]
        for digest in self.digests:
            block, slot = self.cache.find(digest), self.host.find(digest)
            assert block is None or self.on_device[block] == digest
            assert slot is None or self.on_host[slot] == digest

    @rule(data=st.data())
    def hit(self, data: st.DataObject) -> None:
        """Somebody wants content that was computed before, wherever it is."""
        if not self.digests:
            return
        digest = data.draw(st.sampled_from(self.digests))
        block, slot = self.cache.find(digest), self.host.find(digest)
        if block is not None:
            self.cache.pool.acquire([block])
        elif slot is not None and self.cache.pool.num_free:
            block = self.fetch(digest, slot, known=True)
        else:
            return
        self.holders.append(Holder([digest], [True], [block], is_new=False))

    def fetch(self, digest: bytes, slot: int, known: bool) -> int:
        self.host.pin([slot])
        (block,) = self.cache.pool.allocate(1)
        self.host.fetch(slot, block)
        if known:
            self.cache.register(block, digest)
        return block

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.holders:
            holder = data.draw(st.sampled_from(self.holders))
            self.cache.pool.release(holder.blocks)
            self.host.unpin(holder.slots)
            self.holders.remove(holder)

    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        """As the scheduler does: only what was computed by a plan, and before other copies are planned for it."""
        movable = [h for h in self.holders if h.blocks and not h.is_new and len(h.blocks) <= self.host.num_free]
        movable = [h for h in movable if [self.on_device[b] for b in h.blocks] == h.contents]
        if movable:
            holder = data.draw(st.sampled_from(movable))
            columns = zip(holder.blocks, holder.contents, holder.known, strict=True)
            holder.slots = [self.host.hold(block, digest if known else None) for block, digest, known in columns]
            self.cache.pool.release(holder.blocks)
            holder.blocks = []

    @rule(data=st.data())
    def swap_in(self, data: st.DataObject) -> None:
        able = [h for h in self.holders if h.slots and len(h.slots) <= self.cache.pool.num_free]
        if not able:
            return
        holder = data.draw(st.sampled_from(able))
        found = [
            self.cache.find(content) if known else None
            for content, known in zip(holder.contents, holder.known, strict=True)
        ]
        self.cache.pool.acquire([block for block in found if block is not None])
        columns = zip(found, holder.contents, holder.slots, holder.known, strict=True)
        if self.cache.pool.num_free < found.count(None):
            self.cache.pool.release([block for block in found if block is not None])
            return
        holder.blocks = [
            block if block is not None else self.fetch(content, slot, known) for block, content, slot, known in columns
        ]
        self.host.unpin(holder.slots)
        holder.slots = []

    @invariant()
    def every_block_and_slot_is_accounted_for(self) -> None:
        if hasattr(self, "holders"):
            self.cache.check()
            self.cache.pool.check(block for holder in self.holders for block in holder.blocks)
            self.host.check(slot for holder in self.holders for slot in holder.slots)

    def teardown(self) -> None:
        if hasattr(self, "holders"):
            self.plan()


TiersMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestTiersMachine = TiersMachine.TestCase
