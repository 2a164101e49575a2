"""Blocks that are being computed right now, and the sequences that wait for them instead of computing them again."""

from __future__ import annotations

from collections.abc import Iterable

from pageflight.sched.sequence import Sequence, State


class SharedPrefills:
    """Digest of a full block → the sequence that computes it, until the prefix cache knows the block.

    A sequence that would be next to compute such a block is *parked*: it holds nothing, leaves the queue, and comes
    back as soon as the last block it can have from others is computed, or the sequence that computes it has gone. It
    costs nothing in the steps between.
    """

    def __init__(self) -> None:
        self._computed_by: dict[bytes, Sequence] = {}
        self._parked: dict[bytes, list[Sequence]] = {}  # those that ended meanwhile stay until their block is settled
        self.num_parked = 0

    def begin(self, sequence: Sequence, first: int, end: int) -> None:
        """`sequence` computes its blocks `first` … `end - 1`, unless another does already."""
        for digest in sequence.digests[first:end]:
            self._computed_by.setdefault(digest, sequence)

    def awaited(self, sequence: Sequence, num_hits: int, num_full: int) -> bytes | None:
        """What `sequence` should wait for, who would find `num_hits` of its first `num_full` blocks: the digest of the
        last one that others compute for it; None if it has to compute the next one itself.

        Nobody waits for a sequence of lower priority, which may be kept from running.
        """
        awaited = None
        for digest in sequence.digests[num_hits:num_full]:
            other = self._computed_by.get(digest)
            if other is None or other.request.priority < sequence.request.priority:
                break
            awaited = digest
        return awaited

    def park(self, sequence: Sequence, digest: bytes) -> None:
        """`sequence`, out of the queue, waits for the block with this digest."""
        assert digest in self._computed_by, "nobody computes this block"
        sequence.state, sequence.awaited = State.PARKED, digest
        self._parked.setdefault(digest, []).append(sequence)
        self.num_parked += 1

    def forget(self, sequence: Sequence) -> None:
        """`sequence` ended while it was parked; the caller has set its state."""
        assert sequence.state is State.ENDED
        sequence.awaited = None
        self.num_parked -= 1

    def settle(self, digests: Iterable[bytes]) -> list[Sequence]:
        """These blocks are computed: the sequences that need not wait any more."""
        woken: list[Sequence] = []
        for digest in digests:
            if self._computed_by.pop(digest, None) is not None:
                woken += self._wake(digest)
        return woken

    def leave(self, sequence: Sequence) -> list[Sequence]:
        """`sequence` goes, whatever it has computed: the sequences that waited for what is missing."""
        woken: list[Sequence] = []
        for digest in sequence.digests[sequence.num_registered :]:
            if self._computed_by.get(digest) is sequence:
                del self._computed_by[digest]
                woken += self._wake(digest)
        return woken

    def _wake(self, digest: bytes) -> list[Sequence]:
        woken = [sequence for sequence in self._parked.pop(digest, ()) if sequence.awaited == digest]
        for sequence in woken:
            sequence.awaited = None
        self.num_parked -= len(woken)
        return woken

    def check(self, open_sequences: Iterable[Sequence]) -> None:
        """Assert that who is parked waits for a block that a running sequence computes, and that all are counted."""
        parked = [sequence for sequence in open_sequences if sequence.state is State.PARKED]
        assert len(parked) == self.num_parked, f"{len(parked)} sequences are parked, {self.num_parked} counted"
        for sequence in parked:
            assert sequence.awaited is not None and sequence in self._parked[sequence.awaited]
        for digest in self._parked:
            assert digest in self._computed_by, "sequences wait for a block that nobody computes"
        for digest, sequence in self._computed_by.items():
            assert sequence.row >= 0, f"sequence {sequence.handle} computes a block without a row"
            assert digest in sequence.digests[sequence.num_registered :], "a block is computed that was computed before"
