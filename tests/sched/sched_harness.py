"""A scheduler on a FakeRunner that checks everything after every step and keeps what each sequence got."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from rounding_runner import RoundingRunner, alone

from pageflight.core.config import KVConfig, SchedulerConfig
from pageflight.core.plan import Finished, StepEvents, StepPlan
from pageflight.core.request import Request, SamplingParams
from pageflight.loop.clock import ManualClock
from pageflight.loop.recorder import Recorder
from pageflight.loop.watched_scheduler import WatchedScheduler
from pageflight.runners.base import RunnerLimits
from pageflight.runners.fake import FakeRunner, fake_continuation
from pageflight.sched.scheduler import Scheduler

VOCAB_SIZE = 13


class Harness:
    """`ahead` is how many plans are made before the oldest is settled, as an overlapping loop would.

    `settings` are further ones of `SchedulerConfig`; with `deterministic` it runs on a RoundingRunner.
    `kv_admission` is the one that lets caches run full, unless they say otherwise.
    A step takes `step_s` of the manual clock.
    """

    def __init__(
        self,
        *,
        block_size: int = 4,
        num_blocks: int = 32,
        max_num_tokens: int = 16,
        max_num_seqs: int = 4,
        max_model_len: int = 64,
        max_queue_size: int = 100,
        prefix_cache: bool = True,
        ahead: int = 0,
        num_host_blocks: int = 0,
        host_copy_s: float = 0.0,
        step_s: float = 0.0,
        recorder: Recorder | None = None,
        **settings: object,
    ) -> None:
        self.config = SchedulerConfig(
            max_num_tokens=max_num_tokens,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            max_queue_size=max_queue_size,
            **{"kv_admission": "optimistic", **settings},  # type: ignore[arg-type]
        )
        self.kv = KVConfig(
            block_size=block_size,
            num_blocks=num_blocks,
            prefix_cache=prefix_cache,
            num_host_blocks=num_host_blocks,
            host_copy_s=host_copy_s,
        )
        self.scheduler: Scheduler
        if recorder is None:
            self.scheduler = Scheduler(self.config, self.kv, vocab_size=VOCAB_SIZE)
        else:
            self.scheduler = WatchedScheduler(self.config, self.kv, vocab_size=VOCAB_SIZE, recorder=recorder)
        limits = RunnerLimits(
            num_blocks=num_blocks,
            num_host_blocks=num_host_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_model_len=self.scheduler.limits.max_sequence_len,
            vocab_size=VOCAB_SIZE,
        )
        self.runner = (
            RoundingRunner(limits, self.config.replay_rows) if self.config.deterministic else FakeRunner(limits)
        )
        self.clock = ManualClock()
        self.ahead = ahead
        self.step_s = step_s
        self.requests: dict[int, Request] = {}  # by sequence handle
        self.output_ids: dict[int, list[int]] = {}
        self.log_probs: dict[int, list[float]] = {}
        self.finished: dict[int, Finished] = {}
        self.plans: list[StepPlan] = []
        self._under_way: deque[StepPlan] = deque()
        self._next_handle = 0

    def submit(
        self,
        prompt_ids: list[int] | tuple[int, ...],
        *,
        deadline_s: float | None = None,
        priority: int = 0,
        tenant: str = "",
        cache_salt: str = "",
        sequence_index: int = 0,
        output_ids: tuple[int, ...] = (),
        trial_tokens: int = 0,
        is_taken_over: bool = False,
        kv_retention_priority: int | None = None,
        **sampling: object,
    ) -> int:
        """Submit with the given sampling fields; returns the first handle."""
        request = Request(
            handle=self._next_handle,
            prompt_ids=tuple(prompt_ids),
            sampling=replace(SamplingParams(), **sampling),  # type: ignore[arg-type]
            arrival_s=self.clock(),
            deadline_s=deadline_s,
            priority=priority,
            tenant=tenant,
            cache_salt=cache_salt,
            sequence_index=sequence_index,
            output_ids=output_ids,
            trial_tokens=trial_tokens,
            is_taken_over=is_taken_over,
            kv_retention_priority=kv_retention_priority,
        )
        self.scheduler.submit(request, self.clock())
        for handle in range(request.handle, request.handle + request.sampling.n):
            self.requests[handle] = request
            self.output_ids[handle] = []
            self.log_probs[handle] = []
        self._next_handle += request.sampling.n
        self.scheduler.check()
        return request.handle

    @property
    def starts(self) -> list[int]:
        """Handles in the order in which they got rows."""
        return [start.handle for plan in self.plans for start in plan.starts]

    def cancel(self, handle: int) -> bool:
        did_end = self.scheduler.cancel(handle)
        self.scheduler.check()
        return did_end

    def step(self) -> StepPlan | None:
        """One turn of the loop; returns its plan."""
        accused = self.scheduler.accused
        plan = self.scheduler.plan(self.clock())
        self.scheduler.check()
        if accused is not None and plan is not None and self.scheduler.handles[plan.rows].tolist() != [accused]:
            assert accused in self.finished or not self.is_running(accused), f"{accused} is not alone in its step"
        if accused is None:
            self._check_nothing_idles(plan)
        was_under_way = bool(self._under_way)
        if plan is not None:
            self.plans.append(plan)
            self._under_way.append(plan)
            excess = self.kv.block_size - 1 if self.config.deterministic else 0
            assert plan.num_tokens <= self.config.max_num_tokens + excess
        while len(self._under_way) > (self.ahead if plan is not None else 0):
            oldest = self._under_way.popleft()
            self.runner.submit(oldest)
            self.clock.advance(self.step_s)
            self._take(self.scheduler.settle(oldest, self.runner.collect(), self.clock()))
        for ending in self.scheduler.take_endings():
            self._end(ending)
        self.scheduler.check()
        if plan is None and not was_under_way:
            assert not self.scheduler.has_work, "nothing runs although sequences are open"
        return plan

    def is_running(self, handle: int) -> bool:
        """Whether the sequence holds a row."""
        sequence = self.scheduler._batch.open.get(handle)
        return sequence is not None and sequence.row >= 0

    def _check_nothing_idles(self, plan: StepPlan | None) -> None:
        """Work conservation: whoever may start, by quotas, rows, budget and blocks, has been started."""
        batch = self.scheduler._batch
        num_left = self.config.max_num_tokens - (plan.num_tokens if plan is not None else 0)
        least = self.kv.block_size if self.config.deterministic else 1  # of which a chunk can be made
        if self.config.target_inter_token_ms or num_left < least:
            return
        if not batch.rows.num_free:
            return
        head = batch.waiting.peek()  # `plan` did so last: elsewhere it would tell the policy that a tenant leaves
        if head is None:
            return
        if self.config.kv_admission == "forecast" and batch.rows.num_held:
            return  # this plan has moved the running ones on, and with them what is expected
        if plan is not None and (plan.copy_sources is not None or plan.copy_in_slots is not None):
            return  # it held blocks or slots until just now
        hits = batch.space.find(head)
        if batch.shared_prefills.awaited(head, len(hits), batch.space.num_shareable(head)) is None:
            headroom = batch.headroom.of(head, batch.space.num_new(head, hits))
            claim = batch.space.claim(head, hits, headroom)
            assert claim is None, f"sequence {head.handle} waits and nothing is in its way"

    def run(self, max_steps: int = 2000) -> None:
        """Step until nothing is open; then everything has been given back."""
        for _ in range(max_steps):
            if not self.scheduler.has_work and not self._under_way:
                break
            self.step()
        else:
            raise AssertionError(f"sequences are still open after {max_steps} steps")
        for ending in self.scheduler.take_endings():
            self._end(ending)
        space = self.scheduler.space
        assert space.pool.num_free == self.kv.num_blocks
        assert space.host is None or space.host.num_free == self.kv.num_host_blocks
        assert set(self.finished) == set(self.requests), "a sequence got no final event"

    def _take(self, events: StepEvents) -> None:
        for index, handle in enumerate(events.handles.tolist()):
            assert handle not in self.finished, f"sequence {handle} got a token after its final event"
            self.output_ids[handle].append(int(events.ids[index]))
            if events.log_probs is not None:
                self.log_probs[handle].append(float(events.log_probs[index]))
        for ending in events.finished:
            self._end(ending)

    def _end(self, ending: Finished) -> None:
        assert ending.handle not in self.finished, f"sequence {ending.handle} got two final events"
        self.finished[ending.handle] = ending
        request = self.requests[ending.handle]
        assert ending.num_prompt_tokens == len(request.prompt_ids)
        got = len(request.output_ids) + len(self.output_ids[ending.handle])
        assert ending.num_output_tokens == got, f"usage says {ending.num_output_tokens} tokens, {got} were delivered"

    def expected(self, handle: int) -> list[int]:
        """What the sequence must produce when nothing cuts it short, whatever ran beside it."""
        request = self.requests[handle]
        index = request.sequence_index + handle - request.handle
        where = {"sequence_index": index, "vocab_size": VOCAB_SIZE}
        if self.config.deterministic:
            ids = alone(request.prompt_ids, request.sampling, **where, block_size=self.kv.block_size)
        else:
            ids = fake_continuation(request.prompt_ids, request.sampling, **where)
        return ids[len(request.output_ids) :]

    def verify(self) -> None:
        """Every ended sequence has the tokens it would have had alone, and the reason fits."""
        for handle, ending in self.finished.items():
            got, expected = self.output_ids[handle], self.expected(handle)
            sampling = self.requests[handle].sampling
            if ending.reason in ("cancelled", "deadline", "error"):
                assert got == expected[: len(got)], f"sequence {handle}: {got} does not begin {expected}"
                continue
            assert got == expected, f"sequence {handle}: {got} instead of {expected}"
            all_ids = [*self.requests[handle].output_ids, *got]
            is_stop = all_ids[-1] in sampling.stop_token_ids and len(all_ids) > sampling.min_tokens
            assert ending.reason == ("stop" if is_stop else "length")
