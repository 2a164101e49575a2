"""Makes the plan of every step: which rows decode, how prompts go on, who is admitted.

A step is a budget of tokens without phases: running sequences decode first, then prompts go on in chunks, then waiting
sequences are admitted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pageflight.core.config import SchedulerConfig
from pageflight.sched.batch import Batch
from pageflight.sched.borders import AnyBorders, Borders, FixedBorders
from pageflight.sched.draft import Chunks, Flight
from pageflight.sched.kv_space import Claim
from pageflight.sched.pacing import Budget
from pageflight.sched.sequence import Sequence, State

MAX_PARKED_PER_STEP = 64
"""Bounds the cost of a step when a long queue shares one prefix."""


class Planner:
    """Turns the batch as it stands into the next plan and moves it on as if that plan had run."""

    def __init__(self, config: SchedulerConfig, batch: Batch) -> None:
        self._config, self._batch = config, batch
        self._borders: Borders = AnyBorders()
        if config.deterministic:
            self._borders = FixedBorders(batch.space.block_size, config.replay_rows)
        self._ones = np.ones(config.max_num_seqs, np.int32)
        self._trues = np.ones(config.max_num_seqs, np.bool_)
        self._no_rows = np.zeros(0, np.int32)
        self._ones.flags.writeable = self._trues.flags.writeable = False  # plans share them
        self._step = 0

    def plan(self, now_s: float) -> Flight | None:
        """The next step and what its settling must know, or None when nothing can run."""
        batch = self._batch
        batch.drain_rate.turn(now_s, len(batch.waiting) > 0)
        accused = batch.trials.next
        if accused is not None:
            return self._plan_trial(accused, now_s)
        if not batch.rows.num_held and not len(batch.waiting):
            return None
        decode_rows = batch.room_for_decoding()
        chunks = Chunks()
        if batch.prefilling or len(batch.waiting):
            budget = batch.pacer.budget(decode_rows)
            for sequence in batch.prefilling.copy():
                if self._borders.is_spent(budget, has_chunk=bool(chunks.lengths)):
                    break
                self._add_chunk(chunks, sequence, budget)
            self._admit(chunks, budget, now_s)
        if not len(decode_rows) and not chunks.lengths:
            return None
        if chunks.lengths:
            if not self._config.deterministic:  # it would move the borders
                chunks.trim(len(decode_rows), self._config.token_tile)
            self._commit(chunks)
        return self._make_plan(decode_rows, chunks, now_s)

    def _plan_trial(self, accused: Sequence, now_s: float) -> Flight:
        """A step of one sequence; the others stand still."""
        batch, decode_rows, chunks = self._batch, self._no_rows, Chunks()
        if accused.state is State.HELD:
            self._claim_for_trial(accused, now_s)
        if accused.state is State.PREFILL:
            self._add_chunk(chunks, accused, Budget(self._config.max_num_tokens))
            self._commit(chunks)
        else:
            batch.room_for_accused(accused)
            decode_rows = np.array([accused.row], np.int32)
        flight = self._make_plan(decode_rows, chunks, now_s)
        batch.trials.planned(bool(flight.plan.samples[0]), self._can_go_on(accused))
        return flight

    def _claim_for_trial(self, accused: Sequence, now_s: float) -> None:
        """Row and blocks for the sequence whose trial begins, taken from others if need be: it fits an empty cache."""
        batch, claim = self._batch, None
        while claim is None:
            if batch.rows.num_free:
                claim = batch.space.claim(accused, batch.space.find(accused), batch.headroom.reserved(accused))
            if claim is None:
                batch.preempt(batch.victim())
        batch.trials.begin(accused)
        self._start_prefill(accused, claim, now_s)

    def _can_go_on(self, sequence: Sequence) -> bool:
        return sequence.state is State.PREFILL or bool(self._batch.rows.decoding[sequence.row])

    def _add_chunk(self, chunks: Chunks, sequence: Sequence, budget: Budget) -> None:
        """Propose the next chunk of a prefilling sequence, if the budget has one."""
        known = int(self._batch.rows.num_known[sequence.row])
        has_chunk = bool(chunks.lengths)
        length = self._borders.take(budget, sequence.num_computed, sequence.num_prompt, known, has_chunk=has_chunk)
        if length:
            chunks.add(sequence, length)

    def _commit(self, chunks: Chunks) -> None:
        """The chunks are as they will run: move their sequences on."""
        batch, state = self._batch, self._batch.rows
        for sequence, length in zip(chunks.sequences, chunks.lengths, strict=True):
            row = sequence.row
            known = int(state.num_known[row])
            sequence.num_computed += length
            is_last = sequence.num_computed == known
            chunks.samples.append(is_last)
            if is_last:
                chunks.completed.append(sequence)
                batch.prefilling.remove(sequence)
                batch.start_decoding(sequence)
                state.num_known[row] = known + 1
                state.decoding[row] = known + 1 < sequence.max_len

    def _admit(self, chunks: Chunks, budget: Budget, now_s: float) -> None:
        """Give rows and blocks to waiting sequences, in the policy's order, while budget, rows and blocks last.

        Those whose next block is being computed by another step aside for those behind them.
        """
        batch, num_parked = self._batch, 0
        while not self._borders.is_spent(budget, has_chunk=bool(chunks.lengths)) and batch.rows.num_free:
            sequence = batch.waiting.peek()
            if sequence is None:
                return
            places = batch.space.find(sequence)
            awaited = batch.shared_prefills.awaited(sequence, len(places), batch.space.num_shareable(sequence))
            if awaited is not None:
                if num_parked == MAX_PARKED_PER_STEP or batch.shared_prefills.num_parked == batch.rows.num_rows:
                    return
                batch.shared_prefills.park(batch.waiting.pop(), awaited)
                num_parked += 1
                continue
            num_new = batch.space.num_new(sequence, places)
            claim = batch.space.claim(sequence, places, batch.headroom.of(sequence, num_new))
            if claim is None:
                return
            batch.waiting.pop()
            batch.drain_rate.leave(sequence.num_prompt)
            self._start_prefill(sequence, claim, now_s)
            self._add_chunk(chunks, sequence, budget)

    def _start_prefill(self, sequence: Sequence, claim: Claim, now_s: float) -> None:
        batch = self._batch
        batch.counters.admit(sequence, claim, batch.costs)
        if not sequence.was_scheduled:
            batch.order.serves_prompt(sequence.tenant, sequence.num_prompt)
        batch.start_prefill(sequence, claim, now_s)

    def _make_plan(self, decode_rows: NDArray[np.int32], chunks: Chunks, now_s: float) -> Flight:
        batch, state, num_decoding = self._batch, self._batch.rows, len(decode_rows)
        load = batch.pacer.load(decode_rows, chunks.starts, chunks.lengths)
        known = state.num_known[decode_rows]  # a copy
        state.num_known[decode_rows] = known + 1
        exhausted = known + 1 >= state.max_len[decode_rows]
        if exhausted.any():
            batch.stop_decoding(decode_rows[exhausted])
        rows, starts, lengths, samples = decode_rows, known - 1, self._ones[:num_decoding], self._trues[:num_decoding]
        if chunks.lengths:
            rows = np.concatenate((rows, np.array([sequence.row for sequence in chunks.sequences], np.int32)))
            starts = np.concatenate((starts, np.array(chunks.starts, np.int32)))
            lengths = np.concatenate((lengths, np.array(chunks.lengths, np.int32)))
            samples = np.concatenate((samples, np.array(chunks.samples, np.bool_)))
        draft = batch.take_draft()
        copies = batch.space.take_host_copies()
        plan = draft.finish(self._step, rows, starts, lengths, samples, copies)
        batch.counters.copied(copies)
        batch.space.pool.release(draft.copy_sources())
        self._step += 1
        num_context_tokens = sum(chunks.lengths)
        batch.counters.planned(num_context_tokens=num_context_tokens, num_generation_rows=num_decoding)
        return Flight(
            plan=plan,
            num_releases=state.num_releases,
            epochs=state.epochs[rows],
            all_sample=len(chunks.completed) == len(chunks.lengths),
            completed=chunks.completed,
            num_context_tokens=num_context_tokens,
            num_generation_rows=num_decoding,
            planned_s=now_s,
            load=load,
        )
