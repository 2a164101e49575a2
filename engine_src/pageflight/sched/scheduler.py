"""Decides every step: who runs which tokens, in which blocks; and what the sampled ids mean for the sequences.

A step is a budget of tokens without phases: running sequences decode first, then prompts go on in chunks, then waiting
sequences are admitted. Sequences are served by rank: higher `priority` first, then earlier arrival. When no block is
left, the running sequence of the worst rank gives its own back and waits at the place of its rank with all its tokens
(preemption by recompute); the best running one is never asked, so something always advances.

All state of running sequences sits in arrays by row (`Rows`); a decode step is array operations over them. Plans may
run ahead: `plan` may be called again before the last plan is settled, and settling goes in the order of the plans.
Everything depends on the order of calls and on the times passed in, on nothing else.
"""

from __future__ import annotations

from bisect import insort
from collections import deque

import numpy as np
from numpy.typing import NDArray

from pageflight.core.config import KVConfig, SchedulerConfig
from pageflight.core.errors import ConfigError, Draining, InvalidArgument, PageflightError, QueueFull
from pageflight.core.plan import Finished, RowStart, StepEvents, StepPlan, StepResult
from pageflight.core.request import Request
from pageflight.core.stats import CoreStats
from pageflight.sched.admission import AdmissionLimits
from pageflight.sched.counters import Counters
from pageflight.sched.deadlines import Deadlines
from pageflight.sched.draft import Chunks, Draft, Flight
from pageflight.sched.invariants import check_places
from pageflight.sched.kv_space import Claim, KVSpace
from pageflight.sched.rows import Rows
from pageflight.sched.sequence import Sequence, State
from pageflight.sched.waiting import WaitingQueue


class Scheduler:
    """See the module's text. `kv.num_blocks` must be resolved (`kv.capacity`). Not thread-safe: one loop owns it."""

    def __init__(self, config: SchedulerConfig, kv: KVConfig, *, vocab_size: int) -> None:
        if config.max_num_tokens < config.max_num_seqs:
            raise ConfigError(
                f"max_num_tokens={config.max_num_tokens}: must be at least max_num_seqs={config.max_num_seqs}, "
                "so that every running sequence can decode in every step"
            )
        if kv.num_blocks < 1 or kv.block_size < 1:
            raise ConfigError(f"num_blocks={kv.num_blocks}, block_size={kv.block_size}: both must be at least 1")
        self.config, self.kv = config, kv
        self.limits = AdmissionLimits(
            max_model_len=config.max_model_len,
            num_blocks=kv.num_blocks,
            block_size=kv.block_size,
            vocab_size=vocab_size,
            max_sequences=config.max_queue_size,
        )
        self.space = KVSpace(kv)
        self.rows = Rows(config.max_num_seqs, self.limits.max_sequence_len, kv.block_size)
        self.is_draining = False
        self._open: dict[int, Sequence] = {}
        self._waiting = WaitingQueue()
        self._prefilling: list[Sequence] = []  # by rank
        self._deadlines = Deadlines()
        self._draft = Draft()
        self._flights: deque[Flight] = deque()
        self._endings: list[Finished] = []
        self._decode_rows: NDArray[np.int32] | None = None  # cached list of set bits in rows.decoding
        self._ones = np.ones(config.max_num_seqs, np.int32)
        self._trues = np.ones(config.max_num_seqs, np.bool_)
        self._ones.flags.writeable = self._trues.flags.writeable = False  # plans share them
        self._serial = 0
        self._step = 0
        self._counters = Counters()

    # ---- requests -----------------------------------------------------------------------------------------------

    def submit(self, request: Request, now_s: float) -> None:
        """Queue a request. Raises InvalidArgument, PromptTooLong, QueueFull or Draining; then no event follows."""
        try:
            self._submit(request)
        except PageflightError as error:
            self._counters.refuse(error)
            raise

    def _submit(self, request: Request) -> None:
        if self.is_draining:
            raise Draining("the server finishes its open requests and takes no new ones; send it elsewhere")
        tokens = self.limits.admit(request)
        handles = range(request.handle, request.handle + request.sampling.n)
        if any(handle in self._open for handle in handles):
            raise InvalidArgument("handle", request.handle, "is in use by an open sequence")
        num_queued = len(self._open) - self.rows.num_rows  # sequences that would wait if all rows were taken
        if num_queued + len(handles) > self.config.max_queue_size:
            raise QueueFull(max(0, num_queued), self.config.max_queue_size)
        sequences = [
            Sequence(
                request=request,
                handle=handle,
                sequence_index=request.sequence_index + offset,
                serial=self._serial + offset,
                tokens=tokens,
            )
            for offset, handle in enumerate(handles)
        ]
        self._serial += len(sequences)
        for sequence in sequences:
            self._open[sequence.handle] = sequence
        leader, followers = sequences[0], sequences[1:]
        reason = self.limits.end_of_output(request)
        if reason is not None:  # taken over after its last token: only the final event is missing
            leader.state = State.DECODE
            self._finish(leader, reason)
            return
        self._queue_group(leader, followers)
        for sequence in sequences:
            self._deadlines.add(sequence)

    def _queue_group(self, leader: Sequence, followers: list[Sequence]) -> None:
        """Let `leader` wait for a row and `followers` wait for its prompt."""
        leader.followers, leader.leader, leader.state = followers, None, State.WAITING
        for follower in followers:
            follower.leader, follower.state = leader, State.FORKING
        self._waiting.push(leader)

    def cancel(self, handle: int, *, by_client: bool = True) -> bool:
        """End one sequence wherever it is; its blocks are free at once. False if it has ended already.

        Only cancellations `by_client` are counted as such: a stop string ends an answer as it should end.
        """
        sequence = self._open.get(handle)
        if sequence is None:
            return False
        self._counters.cancellations += by_client
        self._finish(sequence, "cancelled")
        return True

    def fail(self, handle: int, message: str) -> bool:
        """End one sequence with reason `error`. False if it has ended already."""
        sequence = self._open.get(handle)
        if sequence is None:
            return False
        self._finish(sequence, "error", message)
        return True

    def drain(self) -> None:
        """Take no new requests; the open ones go on."""
        self.is_draining = True

    def end_all(self, reason: str, message: str = "") -> None:
        """End every open sequence now; `take_endings` has their final events."""
        for sequence in list(self._open.values()):
            self._finish(sequence, reason, message)

    def take_endings(self) -> tuple[Finished, ...]:
        """Final events that no step brought (cancelled, deadline, error), each returned once, here or by `settle`."""
        endings = tuple(self._endings)
        self._endings.clear()
        return endings

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue for a row."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is open."""
        return bool(self._open)

    @property
    def next_deadline_s(self) -> float | None:
        """When `plan` must be called next even if nothing else happens; None for never."""
        return self._deadlines.next_s

    # ---- planning -----------------------------------------------------------------------------------------------

    def plan(self, now_s: float) -> StepPlan | None:
        """The next step, or None when nothing can run (nothing is open, or all waits for a plan to be settled)."""
        while (expired := self._deadlines.pop_expired(now_s)) is not None:
            self._finish(expired, "deadline")
        if not self.rows.num_held and not len(self._waiting):
            return None
        decode_rows = self._room_for_decoding()
        budget = self.config.max_num_tokens - len(decode_rows)
        chunks = Chunks()
        for sequence in self._prefilling.copy() if self._prefilling else ():
            if budget == 0:
                break
            budget -= self._add_chunk(chunks, sequence, budget)
        self._admit(chunks, budget, now_s)
        if not len(decode_rows) and not chunks.lengths:
            return None
        if chunks.lengths:
            chunks.trim(len(decode_rows), self.config.token_tile)
            self._commit(chunks)
        return self._make_plan(decode_rows, chunks)

    def _room_for_decoding(self) -> NDArray[np.int32]:
        """Rows that decode in this step, after each has a block for its last token; may preempt."""
        state, space = self.rows, self.space
        rows = self._rows_decoding()
        room = state.num_blocks[rows] * space.block_size
        short = rows[state.num_known[rows] > room]
        if not len(short):
            return rows
        if len(short) <= space.pool.num_free:
            blocks = space.pool.allocate(len(short))
            columns = state.num_blocks[short]
            state.tables[short, columns] = blocks
            state.num_blocks[short] = columns + 1
            self._draft.table.extend(zip(short.tolist(), columns.tolist(), blocks, strict=True))
            return rows
        for sequence in sorted((state.held_by(row) for row in short.tolist()), key=lambda s: s.rank):
            while sequence.row >= 0 and not space.pool.num_free:
                self._preempt(state.worst())
            if sequence.row >= 0:
                (block,) = space.pool.allocate(1)
                self._draft.table.append((sequence.row, state.append_block(sequence.row, block), block))
        return self._rows_decoding()

    def _rows_decoding(self) -> NDArray[np.int32]:
        if self._decode_rows is None:
            self._decode_rows = np.flatnonzero(self.rows.decoding).astype(np.int32)
            self._decode_rows.flags.writeable = False  # plans share it
        return self._decode_rows

    def _add_chunk(self, chunks: Chunks, sequence: Sequence, budget: int) -> int:
        """Propose the next chunk of a prefilling sequence; returns its length."""
        length = min(budget, int(self.rows.num_known[sequence.row]) - sequence.num_computed)
        chunks.add(sequence, length)
        return length

    def _commit(self, chunks: Chunks) -> None:
        """The chunks are as they will run: move their sequences on."""
        for sequence, length in zip(chunks.sequences, chunks.lengths, strict=True):
            row = sequence.row
            known = int(self.rows.num_known[row])
            sequence.num_computed += length
            is_last = sequence.num_computed == known
            chunks.samples.append(is_last)
            if is_last:
                chunks.completed.append(sequence)
                self._prefilling.remove(sequence)
                self._start_decoding(sequence)
                self.rows.num_known[row] = known + 1
                self.rows.decoding[row] = known + 1 < sequence.max_len

    def _start_decoding(self, sequence: Sequence) -> None:
        sequence.state = State.DECODE
        self.rows.decoding[sequence.row] = True
        self._decode_rows = None

    def _admit(self, chunks: Chunks, budget: int, now_s: float) -> None:
        """Give rows and blocks to waiting sequences, strictly by rank, while budget, rows and blocks last."""
        while budget > 0 and self.rows.num_free:
            sequence = self._waiting.peek()
            if sequence is None:
                return
            claim = self.space.claim(sequence, self.rows.num_growing())
            if claim is None:
                return
            self._waiting.pop()
            sequence.state = State.PREFILL
            sequence.num_computed = claim.num_shared * self.space.block_size
            self._counters.admit(sequence, sequence.num_computed)
            self._take_row(sequence, claim, now_s)
            insort(self._prefilling, sequence, key=lambda s: s.rank)
            budget -= self._add_chunk(chunks, sequence, budget)

    def _take_row(self, sequence: Sequence, claim: Claim, now_s: float) -> None:
        """Put a sequence with its blocks into a row and tell the runner with the next plan."""
        sequence.num_shared = sequence.num_registered = claim.num_shared
        if not sequence.was_scheduled:
            sequence.was_scheduled = True
            sequence.first_scheduled_s = now_s
            sequence.num_cached_tokens = min(claim.num_shared * self.space.block_size, sequence.num_prompt)
            sequence.num_reused_blocks = claim.num_shared
        self._counters.reused_blocks += claim.num_shared
        row = self.rows.take(sequence, claim.blocks)
        start = RowStart(
            row=row,
            handle=sequence.handle,
            sequence_index=sequence.sequence_index,
            token_ids=sequence.tokens,
            num_prompt=sequence.num_prompt,
            sampling=sequence.request.sampling,
        )
        self._draft.start(start, claim.blocks)

    def _make_plan(self, decode_rows: NDArray[np.int32], chunks: Chunks) -> StepPlan:
        state, num_decoding = self.rows, len(decode_rows)
        known = state.num_known[decode_rows]  # a copy
        state.num_known[decode_rows] = known + 1
        exhausted = known + 1 >= state.max_len[decode_rows]
        if exhausted.any():
            state.decoding[decode_rows[exhausted]] = False
            self._decode_rows = None
        rows, starts, lengths, samples = decode_rows, known - 1, self._ones[:num_decoding], self._trues[:num_decoding]
        if chunks.lengths:
            rows = np.concatenate((rows, np.array([sequence.row for sequence in chunks.sequences], np.int32)))
            starts = np.concatenate((starts, np.array(chunks.starts, np.int32)))
            lengths = np.concatenate((lengths, np.array(chunks.lengths, np.int32)))
            samples = np.concatenate((samples, np.array(chunks.samples, np.bool_)))
        draft, self._draft = self._draft, Draft()
        plan = draft.finish(self._step, rows, starts, lengths, samples)
        self.space.pool.release(draft.copy_sources())
        self._step += 1
        self._counters.planned(num_context_tokens=sum(chunks.lengths), num_generation_rows=num_decoding)
        all_sample = len(chunks.completed) == len(chunks.lengths)
        self._flights.append(Flight(plan, state.num_releases, state.epochs[rows], all_sample, chunks.completed))
        return plan

    # ---- settling -----------------------------------------------------------------------------------------------

    def settle(self, plan: StepPlan, result: StepResult, now_s: float) -> StepEvents:
        """Take the oldest plan's sampled ids in: new tokens, full blocks, followers of computed prompts, endings.

        Ids of sequences that ended or were preempted since the plan was made are dropped.
        """
        assert self._flights and self._flights[0].plan is plan, "plans are settled in their order, each once"
        assert result.step == plan.step, f"result of step {result.step} for plan {plan.step}"
        flight, state = self._flights.popleft(), self.rows
        is_live = None
        if flight.num_releases != state.num_releases:
            is_live = state.epochs[plan.rows] == flight.epochs
        if result.broken is not None:
            is_live = self._end_broken(plan, result.broken, is_live)
        if self.space.cache is not None:
            self._register_blocks(plan, is_live)
        rows = plan.rows if flight.all_sample else plan.rows[plan.samples]
        ids, log_probs = result.sampled_ids, result.log_probs
        assert len(ids) == len(rows), f"{len(ids)} ids for {len(rows)} rows that sample"
        if is_live is not None:
            is_live = is_live[plan.samples]
            rows, ids = rows[is_live], ids[is_live]
            log_probs = log_probs[is_live] if log_probs is not None else None
        settled = state.num_settled[rows]
        state.tokens[rows, settled] = ids
        settled += 1
        state.num_settled[rows] = settled
        handles = state.handles[rows]
        self._counters.generated_tokens += len(rows)
        for sequence in flight.completed:
            if sequence.followers and sequence.row >= 0 and state.num_settled[sequence.row] > len(sequence.tokens):
                self._fork(sequence, now_s)
        stopped = state.stopped(rows, ids, settled)
        ended = stopped | (settled >= state.max_len[rows])
        if ended.any():
            for index in np.flatnonzero(ended).tolist():
                self._finish(state.held_by(int(rows[index])), "stop" if stopped[index] else "length")
        return StepEvents(plan.step, handles, ids, log_probs, self.take_endings() if self._endings else ())

    def _end_broken(
        self, plan: StepPlan, broken: NDArray[np.bool_], is_live: NDArray[np.bool_] | None
    ) -> NDArray[np.bool_]:
        """End the sequences whose logits were not finite; the rows [S] that remain. Their blocks are not kept."""
        is_broken = np.zeros(len(plan.rows), np.bool_)
        is_broken[plan.samples] = broken
        if is_live is None:
            is_live = np.ones(len(plan.rows), np.bool_)
        for row in plan.rows[is_broken & is_live].tolist():
            self._finish(self.rows.held_by(row), "error", "the model's logits for this request are not finite")
        return is_live & ~is_broken

    def _register_blocks(self, plan: StepPlan, is_live: NDArray[np.bool_] | None) -> None:
        """Let the prefix cache know the blocks that this plan's chunks have filled."""
        size, state = self.space.block_size, self.rows
        crossing = plan.starts_at % size + plan.lengths >= size
        if is_live is not None:
            crossing &= is_live
        if not crossing.any():
            return
        rows = plan.rows[crossing].tolist()
        ends = (plan.starts_at[crossing] + plan.lengths[crossing]).tolist()
        for row, end in zip(rows, ends, strict=True):
            self.space.register(state.held_by(row), state.tables[row], state.tokens[row], end // size)

    def _fork(self, leader: Sequence, now_s: float) -> None:
        """The leader's prompt is computed: its followers share its blocks, or wait as ordinary sequences."""
        followers, leader.followers = leader.followers, []
        blocks = self.rows.blocks(leader.row)
        for follower in followers:
            follower.leader = None
            waiting = self._waiting.peek()
            claim = None
            if self.rows.num_free and (waiting is None or follower.rank < waiting.rank):
                claim = self.space.fork(blocks, follower.num_prompt, self.rows.num_growing())
            if claim is None:
                follower.state = State.WAITING
                self._waiting.push(follower)
                continue
            follower.digests = leader.digests[: claim.num_shared]
            self._take_row(follower, claim, now_s)
            self._start_decoding(follower)
            if (follower.num_prompt - 1) % self.space.block_size:  # else the block holds nothing of the prompt yet
                source = blocks[claim.num_shared]
                self.space.pool.acquire([source])  # the leader may end before the copy is planned
                self._draft.copies.append((follower.row, source, claim.blocks[-1]))

    # ---- leaving ------------------------------------------------------------------------------------------------

    def _preempt(self, sequence: Sequence) -> None:
        """Take row and blocks from a running sequence; it waits with its tokens and computes them again."""
        in_prefill = sequence.state is State.PREFILL
        sequence.num_computed_before = (
            sequence.num_computed if in_prefill else int(self.rows.num_settled[sequence.row]) - 1
        )
        self._leave_row(sequence)
        sequence.state = State.WAITING
        sequence.is_preempted = True
        self._counters.preemptions += 1
        self._counters.num_preempted += 1
        self._waiting.push(sequence)

    def _leave_row(self, sequence: Sequence) -> None:
        row = sequence.row
        if sequence.state is State.PREFILL:
            self._prefilling.remove(sequence)
        self._decode_rows = None
        blocks = self.rows.release(row)
        sequence.num_new_blocks += len(blocks) - sequence.num_shared
        self.space.pool.release(blocks)
        self.space.pool.release(self._draft.end(row))

    def _finish(self, sequence: Sequence, reason: str, message: str = "") -> None:
        """Make the one final event of an open sequence and forget it."""
        was_waiting = sequence.state is State.WAITING
        if sequence.row >= 0:
            self._leave_row(sequence)
        sequence.state = State.ENDED
        if was_waiting:
            self._waiting.forget(sequence)
            self._counters.num_preempted -= sequence.is_preempted
        elif sequence.leader is not None:
            sequence.leader.followers.remove(sequence)
        del self._open[sequence.handle]
        if sequence.followers:  # it ended before its prompt was computed
            self._queue_group(sequence.followers[0], sequence.followers[1:])
            sequence.followers = []
        self._endings.append(
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

    # ---- looking ------------------------------------------------------------------------------------------------

    def stats(self) -> CoreStats:
        """Gauges and counters; memory is for the owner of the runner to fill in."""
        counters, num_forking = self._counters, len(self._open) - self.rows.num_held - len(self._waiting)
        return CoreStats(
            num_running=self.rows.num_held,
            num_context=len(self._prefilling),
            num_waiting=len(self._waiting) + num_forking,
            num_preempted=counters.num_preempted,
            max_num_seqs=self.config.max_num_seqs,
            num_blocks=self.kv.num_blocks,
            num_free_blocks=self.space.pool.num_free,
            block_size=self.kv.block_size,
            last_step_context_tokens=counters.last_step_context_tokens if self._open else 0,
            last_step_generation_rows=counters.last_step_generation_rows if self._open else 0,
            steps=counters.steps,
            prompt_tokens=counters.prompt_tokens,
            generated_tokens=counters.generated_tokens,
            cached_tokens=counters.cached_tokens,
            recomputed_tokens=counters.recomputed_tokens,
            reused_blocks=counters.reused_blocks,
            preemptions=counters.preemptions,
            cancellations=counters.cancellations,
            refusals=dict(counters.refusals),
        )

    def check(self) -> None:
        """Assert every invariant: no block lost or doubly owned, every open sequence in exactly one place."""
        check_places(self._open, self._waiting, self._prefilling, self.rows)
        held = [block for row in range(self.rows.num_rows) for block in self.rows.blocks(row)]
        self.space.check(held + self._draft.copy_sources())
        num_preempted = sum(s.state is State.WAITING and s.is_preempted for s in self._open.values())
        assert num_preempted == self._counters.num_preempted
        if self._decode_rows is not None:
            assert self._decode_rows.tolist() == np.flatnonzero(self.rows.decoding).tolist()
