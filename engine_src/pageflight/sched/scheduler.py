"""Decides every step: who runs which tokens, in which blocks; and what the sampled ids mean for the sequences.

A step is a budget of tokens without phases: running sequences decode first, then prompts go on in chunks, then waiting
sequences are admitted, in the order of the policy (`Order`, `FairShare`). When no block is left, the running sequence
that the policy serves last gives its own back and waits at its place with all its tokens (preemption by recompute).
Only rows that decode ask for blocks, and each that gets one keeps its next token, so something always advances.

All state of running sequences sits in arrays by row (`Rows`); a decode step is array operations over them. Plans may
run ahead: `plan` may be called again before the last plan is settled, and settling goes in the order of the plans.
Everything depends on the order of calls and on the times passed in, on nothing else.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pageflight.core.config import KVConfig, SchedulerConfig
from pageflight.core.errors import ConfigError, Draining, InvalidArgument, PageflightError
from pageflight.core.plan import Finished, StepEvents, StepPlan, StepResult
from pageflight.core.request import Request
from pageflight.core.stats import CoreStats
from pageflight.core.tenants import Tenants
from pageflight.sched.admission import AdmissionLimits
from pageflight.sched.batch import Batch
from pageflight.sched.deadlines import Deadlines
from pageflight.sched.kv_space import KVSpace
from pageflight.sched.planning import Planner
from pageflight.sched.queue_limits import QueueLimits
from pageflight.sched.sequence import Sequence, State
from pageflight.sched.settling import Settler


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
        self.is_draining = False
        self._batch = Batch(config, kv, self.limits.max_sequence_len)
        self._planner = Planner(config, self._batch)
        self._settler = Settler(self._batch)
        self._queue_limits = QueueLimits(config, self._batch)
        self._deadlines = Deadlines()
        self._serial = 0

    @property
    def space(self) -> KVSpace:
        """The blocks and who holds them."""
        return self._batch.space

    # ---- requests -----------------------------------------------------------------------------------------------

    def submit(self, request: Request, now_s: float) -> None:
        """Queue a request. Raises InvalidArgument, PromptTooLong, QueueFull or Draining; then no event follows."""
        try:
            self._submit(request, now_s)
        except PageflightError as error:
            self._batch.counters.refuse(error)
            raise

    def _submit(self, request: Request, now_s: float) -> None:
        if self.is_draining:
            raise Draining("the server finishes its open requests and takes no new ones; send it elsewhere")
        batch, tokens = self._batch, self.limits.admit(request)
        handles = range(request.handle, request.handle + request.sampling.n)
        if any(handle in batch.open for handle in handles):
            raise InvalidArgument("handle", request.handle, "is in use by an open sequence")
        tenant = batch.tenants.named(request.tenant)
        self._queue_limits.check(request, tenant)
        sequences = [
            Sequence(
                request=request,
                handle=handle,
                sequence_index=request.sequence_index + offset,
                tenant=tenant,
                rank=batch.order.rank(request, self._serial + offset, now_s),
                tokens=tokens,
            )
            for offset, handle in enumerate(handles)
        ]
        self._serial += len(sequences)
        for sequence in sequences:
            batch.open[sequence.handle] = sequence
        tenant.num_open += len(sequences)
        leader, followers = sequences[0], sequences[1:]
        reason = self.limits.end_of_output(request)
        if reason is not None:  # taken over after its last token: only the final event is missing
            leader.state = State.DECODE
            batch.finish(leader, reason)
            return
        batch.queue_group(leader, followers)
        for sequence in sequences:
            self._deadlines.add(sequence)

    def cancel(self, handle: int, *, by_client: bool = True) -> bool:
        """End one sequence wherever it is; its blocks are free at once. False if it has ended already.

        Only cancellations `by_client` are counted as such: a stop string ends an answer as it should end.
        """
        sequence = self._batch.open.get(handle)
        if sequence is None:
            return False
        self._batch.counters.cancellations += by_client
        self._batch.finish(sequence, "cancelled")
        return True

    def fail(self, handle: int, message: str) -> bool:
        """End one sequence with reason `error`. False if it has ended already."""
        sequence = self._batch.open.get(handle)
        if sequence is None:
            return False
        self._batch.finish(sequence, "error", message)
        return True

    def set_tenants(self, tenants: Tenants) -> None:
        """Other weights, quotas and budgets from now on. What was accepted under the old ones is still served."""
        self._batch.set_tenants(tenants)

    def drain(self) -> None:
        """Take no new requests; the open ones go on."""
        self.is_draining = True

    def end_all(self, reason: str, message: str = "") -> None:
        """End every open sequence now; `take_endings` has their final events."""
        for sequence in list(self._batch.open.values()):
            self._batch.finish(sequence, reason, message)

    def take_endings(self) -> tuple[Finished, ...]:
        """Final events that no step brought (cancelled, deadline, error), each returned once, here or by `settle`."""
        return self._batch.take_endings()

    @property
    def num_waiting(self) -> int:
        """Sequences that could take a row now or soon: in the queue, or beside it."""
        return len(self._batch.waiting) + self._batch.shared_prefills.num_parked + self._batch.trials.num_held

    @property
    def accused(self) -> int | None:
        """Handle of the sequence that will be alone in the next plan; None when the plan is one for all."""
        accused = self._batch.trials.next
        return None if accused is None else accused.handle

    @property
    def handles(self) -> NDArray[np.int64]:
        """[R] whose the rows are, for those that are held. Not to be changed."""
        return self._batch.rows.handles

    @property
    def has_work(self) -> bool:
        """Whether any sequence is open."""
        return bool(self._batch.open)

    @property
    def next_deadline_s(self) -> float | None:
        """When `plan` must be called next even if nothing else happens; None for never."""
        return self._deadlines.next_s

    # ---- steps --------------------------------------------------------------------------------------------------

    def plan(self, now_s: float) -> StepPlan | None:
        """The next step, or None when nothing can run (nothing is open, or all waits for a plan to be settled)."""
        while (expired := self._deadlines.pop_expired(now_s)) is not None:
            self._batch.finish(expired, "deadline")
        flight = self._planner.plan(now_s)
        if flight is None:
            return None
        self._settler.depart(flight)
        return flight.plan

    def settle(self, plan: StepPlan, result: StepResult, now_s: float) -> StepEvents:
        """Take the oldest plan's sampled ids in: new tokens, full blocks, followers of computed prompts, endings.

        Ids of sequences that ended or were preempted since the plan was made are dropped.
        """
        return self._settler.settle(plan, result, now_s)

    # ---- looking ------------------------------------------------------------------------------------------------

    def stats(self) -> CoreStats:
        """Gauges and counters; memory is for the owner of the runner to fill in."""
        batch, counters = self._batch, self._batch.counters
        num_forking = len(batch.open) - batch.rows.num_held - len(batch.waiting)
        return CoreStats(
            num_running=batch.rows.num_held,
            num_context=len(batch.prefilling),
            num_waiting=len(batch.waiting) + num_forking,
            num_waiting_tokens=batch.waiting.num_tokens,
            queue_wait_s=batch.drain_rate.wait_s(batch.waiting.num_tokens) or 0.0,
            num_preempted=counters.num_preempted,
            max_num_seqs=self.config.max_num_seqs,
            num_blocks=self.kv.num_blocks,
            num_free_blocks=batch.space.pool.num_free,
            num_host_blocks=self.kv.num_host_blocks,
            num_free_host_blocks=batch.space.host.num_free if batch.space.host is not None else 0,
            block_size=self.kv.block_size,
            last_step_context_tokens=counters.last_step_context_tokens if batch.open else 0,
            last_step_generation_rows=counters.last_step_generation_rows if batch.open else 0,
            steps=counters.steps,
            prompt_tokens=counters.prompt_tokens,
            generated_tokens=counters.generated_tokens,
            cached_tokens=counters.cached_tokens,
            device_cached_tokens=counters.cached_tokens - counters.host_cached_tokens,
            host_cached_tokens=counters.host_cached_tokens,
            queried_tokens=counters.prompt_tokens if self.kv.prefix_cache else 0,
            saved_s=counters.saved_s,
            recomputed_tokens=counters.recomputed_tokens,
            reused_blocks=counters.reused_blocks,
            preemptions=counters.preemptions,
            swaps_out=counters.swaps_out,
            swaps_in=counters.swaps_in,
            blocks_copied_out=counters.blocks_copied_out,
            blocks_copied_in=counters.blocks_copied_in,
            cancellations=counters.cancellations,
            refusals=dict(counters.refusals),
        )

    def check(self) -> None:
        """Assert every invariant: no block lost or doubly owned, every open sequence in exactly one place."""
        self._batch.check()
