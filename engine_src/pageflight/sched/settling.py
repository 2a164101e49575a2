"""What the sampled ids of a step mean for the sequences: new tokens, full blocks, computed prompts, endings."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from pageflight.core.plan import StepEvents, StepPlan, StepResult
from pageflight.sched.batch import Batch
from pageflight.sched.draft import Flight
from pageflight.sched.sequence import Sequence, State


class Settler:
    """Knows the plans under way and takes their results in, in their order."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._flights: deque[Flight] = deque()

    def depart(self, flight: Flight) -> None:
        """A plan goes to the runner."""
        self._flights.append(flight)

    def settle(self, plan: StepPlan, result: StepResult, now_s: float) -> StepEvents:
        """Take the oldest plan's sampled ids in: new tokens, full blocks, followers of computed prompts, endings.

        Ids of sequences that ended or were preempted since the plan was made are dropped.
        """
        assert self._flights and self._flights[0].plan is plan, "plans are settled in their order, each once"
        assert result.step == plan.step, f"result of step {result.step} for plan {plan.step}"
        flight, batch, state = self._flights.popleft(), self._batch, self._batch.rows
        batch.costs.settle(flight.planned_s, now_s, flight.num_context_tokens, flight.num_generation_rows)
        batch.pacer.settle(flight.load, flight.planned_s, now_s)
        is_live = None
        if flight.num_releases != state.num_releases:
            is_live = state.epochs[plan.rows] == flight.epochs
        if result.broken is not None:
            is_live = self._end_broken(plan, result.broken, is_live)
        if batch.space.cache is not None:
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
        batch.counters.generated_tokens += len(rows)
        batch.order.serves_outputs(state.lanes[rows])
        for sequence in flight.completed:
            if sequence.followers and sequence.row >= 0 and state.num_settled[sequence.row] > len(sequence.tokens):
                self._fork(sequence, now_s)
        stopped = state.stopped(rows, ids, settled)
        ended = stopped | (settled >= state.max_len[rows])
        if ended.any():
            for index in np.flatnonzero(ended).tolist():
                batch.finish(state.held_by(int(rows[index])), "stop" if stopped[index] else "length")
        return StepEvents(plan.step, handles, ids, log_probs, batch.take_endings())

    def _end_broken(
        self, plan: StepPlan, broken: NDArray[np.bool_], is_live: NDArray[np.bool_] | None
    ) -> NDArray[np.bool_]:
        """End the sequences whose logits were not finite; the rows [S] that remain. Their blocks are not kept."""
        batch, is_broken = self._batch, np.zeros(len(plan.rows), np.bool_)
        is_broken[plan.samples] = broken
        if is_live is None:
            is_live = np.ones(len(plan.rows), np.bool_)
        for row in plan.rows[is_broken & is_live].tolist():
            batch.finish(batch.rows.held_by(row), "error", "the model's logits for this request are not finite")
        return is_live & ~is_broken

    def _register_blocks(self, plan: StepPlan, is_live: NDArray[np.bool_] | None) -> None:
        """Let the prefix cache know the blocks that this plan's chunks have filled."""
        space, state = self._batch.space, self._batch.rows
        size = space.block_size
        crossing = plan.starts_at % size + plan.lengths >= size
        if is_live is not None:
            crossing &= is_live
        if not crossing.any():
            return
        rows = plan.rows[crossing].tolist()
        ends = (plan.starts_at[crossing] + plan.lengths[crossing]).tolist()
        for row, end in zip(rows, ends, strict=True):
            computed = space.register(state.held_by(row), state.tables[row], state.tokens[row], end // size)
            woken = self._batch.shared_prefills.settle(computed)
            if woken:
                self._batch.requeue(woken)

    def _fork(self, leader: Sequence, now_s: float) -> None:
        """The leader's prompt is computed: its followers share its blocks, or wait as ordinary sequences."""
        batch, space = self._batch, self._batch.space
        followers, leader.followers = leader.followers, []
        blocks = batch.rows.blocks(leader.row)
        for follower in followers:
            follower.leader = None
            claim = None
            if batch.rows.num_free and batch.waiting.may_overtake(follower):
                claim = space.fork(blocks, follower.num_prompt, batch.headroom.of(follower, 1))
            if claim is None:
                follower.state = State.WAITING
                batch.waiting.push(follower)
                continue
            follower.digests = leader.digests[: claim.num_shared]
            if batch.config.deterministic:  # its first token comes from a chunk, as it would without a leader
                shared = claim._replace(num_computed=claim.num_shared * space.block_size)
                batch.start_prefill(follower, shared, now_s)
                continue
            batch.take_row(follower, claim, now_s)
            batch.start_decoding(follower)
            if (follower.num_prompt - 1) % space.block_size:  # else the block holds nothing of the prompt yet
                source = blocks[claim.num_shared]
                space.pool.acquire([source])  # the leader may end before the copy is planned
                batch.draft.copies.append((follower.row, source, claim.blocks[-1]))
