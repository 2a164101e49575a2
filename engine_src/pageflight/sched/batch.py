"""Every open sequence, where it is and what it holds: how it comes into the batch, grows and leaves."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pageflight.core.config import KVConfig, SchedulerConfig
from pageflight.core.plan import Finished, RowStart
from pageflight.core.tenants import Tenants
from pageflight.kv.capacity import blocks_for
from pageflight.sched.costs import Costs
from pageflight.sched.counters import Counters
from pageflight.sched.draft import Draft
from pageflight.sched.drain_rate import DrainRate
from pageflight.sched.fair_share import FairShare
from pageflight.sched.headroom import Headroom
from pageflight.sched.invariants import check_places, check_tenants
from pageflight.sched.kv_space import Claim, KVSpace
from pageflight.sched.order import Order
from pageflight.sched.pacing import Pacer
from pageflight.sched.rows import Rows
from pageflight.sched.sequence import Sequence, State
from pageflight.sched.shared_prefills import SharedPrefills
from pageflight.sched.tenants import TenantBook
from pageflight.sched.trials import Trials
from pageflight.sched.waiting import WaitingQueue


class Batch:
    """The sequences of one scheduler. It moves them; when, and which, is decided by its callers.

    What a move means for the runner goes into `draft`, the next plan's differences.
    """

    def __init__(self, config: SchedulerConfig, kv: KVConfig, max_sequence_len: int) -> None:
        self.config = config
        self.costs = Costs(kv.host_copy_s, kv.block_size)
        self.space = KVSpace(kv, self.costs, tells_output=config.deterministic)
        self.rows = Rows(config.max_num_seqs, max_sequence_len, kv.block_size)
        self.open: dict[int, Sequence] = {}
        self.order = FairShare(config) if config.scheduling_policy == "fair" else Order(config)
        self.tenants = TenantBook(config.tenants, kv.num_blocks, self.order.is_past)
        self.waiting = WaitingQueue(self.order, self.full_blocks)
        self.shared_prefills = SharedPrefills()
        self.trials = Trials()
        self.prefilling: list[Sequence] = []  # in the order in which they are served
        self.drain_rate = DrainRate()
        self.pacer = Pacer(config, self.rows)
        self.headroom = Headroom(config, self.rows, self.space)
        self.draft = Draft()
        self.counters = Counters()
        self.endings: list[Finished] = []
        self._decode_rows: NDArray[np.int32] | None = None  # cached list of set bits in rows.decoding

    # ---- coming -------------------------------------------------------------------------------------------------

    def queue_group(self, leader: Sequence, followers: list[Sequence]) -> None:
        """Let `leader` wait for a row and `followers` wait for its prompt."""
        leader.followers, leader.leader, leader.state = followers, None, State.WAITING
        for follower in followers:
            follower.leader, follower.state = leader, State.FORKING
        if leader.request.trial_tokens:
            self.trials.hold(leader)
        else:
            self.waiting.push(leader)

    def take_row(self, sequence: Sequence, claim: Claim, now_s: float) -> None:
        """Put a sequence with its blocks into a row and tell the runner with the next plan."""
        sequence.num_shared = sequence.num_registered = claim.num_shared
        if not sequence.was_scheduled:
            sequence.was_scheduled = True
            sequence.first_scheduled_s = now_s
            sequence.num_cached_tokens = min(claim.num_shared * self.space.block_size, sequence.num_prompt)
            sequence.num_reused_blocks = claim.num_shared
        self.counters.reused_blocks += claim.num_shared
        self.shared_prefills.begin(sequence, claim.num_shared, len(sequence.tokens) // self.space.block_size)
        tenant = sequence.tenant
        if not tenant.num_running:
            self.order.starts(tenant)
        tenant.num_running += 1
        tenant.num_blocks += self.full_blocks(sequence)
        row = self.rows.take(sequence, claim.blocks)
        start = RowStart(
            row=row,
            handle=sequence.handle,
            sequence_index=sequence.sequence_index,
            token_ids=sequence.tokens,
            num_prompt=sequence.num_prompt,
            sampling=sequence.request.sampling,
        )
        self.draft.start(start, claim.blocks)

    def start_prefill(self, sequence: Sequence, claim: Claim, now_s: float) -> None:
        """Give a sequence a row, in which it computes what is not in the first of its blocks."""
        sequence.state = State.PREFILL
        sequence.num_computed = claim.num_computed
        self.take_row(sequence, claim, now_s)
        self.order.place(self.prefilling, sequence)

    def set_tenants(self, tenants: Tenants) -> None:
        """Other weights, quotas and budgets from now on."""
        self.tenants.change(tenants)
        for tenant in self.tenants:
            self.order.reweigh(tenant)
            self.waiting.reconsider(tenant)

    def full_blocks(self, sequence: Sequence) -> int:
        """Blocks of a sequence that has reached its full length; the last token needs none."""
        return blocks_for(sequence.max_len - 1, self.space.block_size)

    def start_decoding(self, sequence: Sequence) -> None:
        sequence.state = State.DECODE
        self.rows.decoding[sequence.row] = True
        self._decode_rows = None

    def stop_decoding(self, rows: NDArray[np.int32]) -> None:
        """`rows` have no token left to compute."""
        self.rows.decoding[rows] = False
        self._decode_rows = None

    def requeue(self, sequences: list[Sequence]) -> None:
        """Parked sequences go back to the queue, to the place of their rank."""
        for sequence in sequences:
            sequence.state = State.WAITING
            self.waiting.push(sequence)

    # ---- growing ------------------------------------------------------------------------------------------------

    def room_for_decoding(self) -> NDArray[np.int32]:
        """Rows that decode in this step, after each has a block for its last token; may preempt."""
        state, space = self.rows, self.space
        rows = self.rows_decoding()
        room = state.num_blocks[rows] * space.block_size
        short = rows[state.num_known[rows] > room]
        if not len(short):
            return rows
        if len(short) <= space.pool.num_free:
            blocks = space.pool.allocate(len(short))
            columns = state.num_blocks[short]
            state.tables[short, columns] = blocks
            state.num_blocks[short] = columns + 1
            self.draft.table.extend(zip(short.tolist(), columns.tolist(), blocks, strict=True))
            return rows
        for sequence in [state.held_by(row) for row in self._by_rank(short).tolist()]:
            while sequence.row >= 0 and not space.pool.num_free:
                self.preempt(self.victim())
            if sequence.row >= 0:
                (block,) = space.pool.allocate(1)
                self.draft.table.append((sequence.row, state.append_block(sequence.row, block), block))
        return self.rows_decoding()

    def room_for_accused(self, accused: Sequence) -> None:
        """A block for the last token of the sequence that is alone in this step; may preempt any other.

        Never itself: it would wait and then run among others, its trial not over.
        """
        state, row, space = self.rows, accused.row, self.space
        if state.num_known[row] <= state.num_blocks[row] * space.block_size:
            return
        while not space.pool.num_free:
            self.preempt(self.victim(spared=accused))
        (block,) = space.pool.allocate(1)
        self.draft.table.append((row, state.append_block(row, block), block))

    def rows_decoding(self) -> NDArray[np.int32]:
        if self._decode_rows is None:
            self._decode_rows = np.flatnonzero(self.rows.decoding).astype(np.int32)
            self._decode_rows.flags.writeable = False  # plans share it
        return self._decode_rows

    def _by_rank(self, rows: NDArray[np.int32]) -> NDArray[np.int32]:
        return self.rows.by_rank(rows, self.order.excess(self.rows.lanes[rows]))

    # ---- leaving ------------------------------------------------------------------------------------------------

    def victim(self, spared: Sequence | None = None) -> Sequence:
        """The running sequence that the policy serves last: of the tenant most above its share, then of the worst rank.

        At least one row is held by another than `spared`.
        """
        rows = self.rows.held()
        if spared is not None:
            rows = rows[rows != spared.row]
        return self.rows.held_by(int(self._by_rank(rows)[-1]))

    def preempt(self, sequence: Sequence) -> None:
        """Take row and blocks from a running sequence; it waits with its tokens and computes them again.

        Where that costs more than copying them, its blocks wait for it on the host.
        """
        row = sequence.row
        num_computed = sequence.num_computed
        if sequence.state is State.DECODE:
            num_computed = int(self.rows.num_settled[row]) - 1
        sequence.num_computed_before = num_computed
        if self.config.deterministic and num_computed < sequence.num_prompt:
            num_computed -= num_computed % self.space.block_size  # its last chunk, under way, begins there once more
        if row not in self.draft.starts:  # else its blocks are not filled before the next plan
            self.counters.swaps_out += self.space.swap_out(sequence, self.rows.blocks(row), num_computed)
        self._leave_row(sequence)
        sequence.state = State.WAITING
        sequence.is_preempted = True
        self.counters.preemptions += 1
        self.counters.num_preempted += 1
        self.waiting.push(sequence)

    def _leave_row(self, sequence: Sequence) -> None:
        row = sequence.row
        if sequence.state is State.PREFILL:
            self.prefilling.remove(sequence)
        self._decode_rows = None
        self.requeue(self.shared_prefills.leave(sequence))
        blocks = self.rows.release(row)
        sequence.num_new_blocks += len(blocks) - sequence.num_shared
        self.space.pool.release(blocks)
        self.space.pool.release(self.draft.end(row))
        tenant = sequence.tenant
        tenant.num_running -= 1
        tenant.num_blocks -= self.full_blocks(sequence)
        if not tenant.num_running:
            self.order.stops(tenant)
        self.waiting.reconsider(tenant)

    def finish(self, sequence: Sequence, reason: str, message: str = "") -> None:
        """Make the one final event of an open sequence and forget it."""
        before = sequence.state
        if sequence.row >= 0:
            self._leave_row(sequence)
        sequence.state = State.ENDED
        if before is State.WAITING:
            self.waiting.forget(sequence)
        elif before is State.HELD:
            self.trials.forget(sequence)
        elif before is State.PARKED:
            self.shared_prefills.forget(sequence)
        elif sequence.leader is not None:
            sequence.leader.followers.remove(sequence)
        if before in (State.WAITING, State.PARKED):
            self.counters.num_preempted -= sequence.is_preempted
            self.space.drop_swapped(sequence)
        self.headroom.learn(sequence)
        del self.open[sequence.handle]
        sequence.tenant.num_open -= 1
        if sequence.followers:  # it ended before its prompt was computed
            self.queue_group(sequence.followers[0], sequence.followers[1:])
            sequence.followers = []
        self.endings.append(
            Finished(
                handle=sequence.handle,
                reason=reason,
                num_prompt_tokens=sequence.num_prompt,
                num_output_tokens=len(sequence.tokens) - sequence.num_prompt,
                first_scheduled_s=sequence.first_scheduled_s,
                num_cached_tokens=sequence.num_cached_tokens,
                num_reused_blocks=sequence.num_reused_blocks,
                num_new_blocks=sequence.num_new_blocks,
                message=message,
            )
        )

    def take_draft(self) -> Draft:
        """The differences gathered since the last plan; the next ones begin."""
        draft, self.draft = self.draft, Draft()
        return draft

    def take_endings(self) -> tuple[Finished, ...]:
        """Final events since the last call."""
        if not self.endings:
            return ()
        endings = tuple(self.endings)
        self.endings.clear()
        return endings

    def check(self) -> None:
        """Assert every invariant: no block lost or doubly owned, every open sequence in exactly one place."""
        check_places(self.open, self.waiting, self.prefilling, self.rows)
        check_tenants(self.open.values(), self.tenants, self.full_blocks)
        held = [block for row in range(self.rows.num_rows) for block in self.rows.blocks(row)]
        swapped = [sequence.swapped for sequence in self.open.values() if sequence.swapped is not None]
        self.space.check(held + self.draft.copy_sources(), swapped)
        assert all(s.row < 0 and s.is_preempted for s in self.open.values() if s.swapped is not None)
        self.shared_prefills.check(self.open.values())
        self.trials.check(self.open.values())
        num_preempted = sum(s.state in (State.WAITING, State.PARKED) and s.is_preempted for s in self.open.values())
        assert num_preempted == self.counters.num_preempted
        if self._decode_rows is not None:
            assert self._decode_rows.tolist() == np.flatnonzero(self.rows.decoding).tolist()
