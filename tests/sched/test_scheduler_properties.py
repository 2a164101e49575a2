"""Random arrivals, cancels, deadlines, limits and tiny caches; everything is checked after every step."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sched_harness import Harness

from pageflight.core.errors import PageflightError, PromptTooLong, QueueFull

# Few different tokens and common beginnings, so that prefixes meet and blocks are shared.
BEGINNINGS = st.sampled_from([(), (1, 2, 3, 4), (1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9), (7,) * 6])
PROMPTS = st.builds(
    lambda beginning, rest: (*beginning, *rest),
    BEGINNINGS,
    st.lists(st.integers(0, 2), min_size=1, max_size=9),
)


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of requests and steps: no block is lost, each sequence ends once, with the tokens it has alone."""

    def __init__(self) -> None:
        super().__init__()
        self.harness: Harness | None = None

    @initialize(
        block_size=st.sampled_from([1, 2, 4]),
        num_blocks=st.integers(6, 30),
        max_num_seqs=st.integers(1, 5),
        spare_tokens=st.integers(0, 12),
        max_queue_size=st.integers(1, 8),
        prefix_cache=st.booleans(),
        ahead=st.sampled_from([0, 0, 1, 2]),
    )
    def build(
        self,
        block_size: int,
        num_blocks: int,
        max_num_seqs: int,
        spare_tokens: int,
        max_queue_size: int,
        prefix_cache: bool,
        ahead: int,
    ) -> None:
        self.harness = Harness(
            block_size=block_size,
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            max_num_tokens=max_num_seqs + spare_tokens,
            max_model_len=48,
            max_queue_size=max_queue_size,
            prefix_cache=prefix_cache,
            ahead=ahead,
        )

    @rule(
        prompt=PROMPTS,
        max_tokens=st.integers(1, 14),
        min_share=st.sampled_from([0.0, 0.0, 0.5, 1.0]),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        temperature=st.sampled_from([0.0, 1.0]),
        seed=st.integers(0, 3),
        stop_token_ids=st.sampled_from([(), (), (0,), (3, 4), (1, 5, 7, 8, 9, 10)]),
        log_probs=st.booleans(),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        patience_s=st.sampled_from([None, None, None, 0.0, 2.0, 6.0]),
        tenant=st.sampled_from(["", "", "a"]),
        cache_salt=st.sampled_from(["", "", "s"]),
    )
    def submit(
        self,
        prompt: tuple[int, ...],
        max_tokens: int,
        min_share: float,
        n: int,
        temperature: float,
        seed: int,
        stop_token_ids: tuple[int, ...],
        log_probs: bool,
        priority: int,
        patience_s: float | None,
        tenant: str,
        cache_salt: str,
    ) -> None:
        assert self.harness is not None
        harness = self.harness
        try:
            harness.submit(
                prompt,
                max_tokens=max_tokens,
                min_tokens=int(min_share * max_tokens),
                n=n,
                temperature=temperature,
                seed=seed,
                stop_token_ids=stop_token_ids,
                log_probs=log_probs,
                priority=priority,
                deadline_s=None if patience_s is None else harness.clock() + patience_s,
                tenant=tenant,
                cache_salt=cache_salt,
            )
        except PromptTooLong:
            assert len(prompt) + max_tokens > harness.scheduler.limits.max_sequence_len
        except QueueFull:
            assert harness.scheduler.stats().num_waiting + n > harness.config.max_queue_size
        except PageflightError:
            assert n > harness.config.max_queue_size

    @precondition(lambda self: self.harness is not None and self.harness.requests)
    @rule(data=st.data(), num_kept=st.integers(0, 6))
    def take_over(self, data: st.DataObject, num_kept: int) -> None:
        """A sequence comes back with some of its output, as after a restart of the core."""
        assert self.harness is not None
        harness = self.harness
        handle = data.draw(st.sampled_from(sorted(harness.requests)))
        request = harness.requests[handle]
        if request.output_ids:
            return
        expected = harness.expected(handle)
        with contextlib.suppress(QueueFull):
            harness.submit(
                request.prompt_ids,
                output_ids=tuple(expected[:num_kept]),
                sequence_index=request.sequence_index + handle - request.handle,
                max_tokens=request.sampling.max_tokens,
                min_tokens=request.sampling.min_tokens,
                temperature=request.sampling.temperature,
                seed=request.sampling.seed,
                stop_token_ids=request.sampling.stop_token_ids,
            )

    @precondition(lambda self: self.harness is not None and self.harness.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        assert self.harness is not None
        handle = data.draw(st.sampled_from(sorted(self.harness.requests)))
        did_end = self.harness.cancel(handle)
        assert not (did_end and handle in self.harness.finished), "an ended sequence was still open"

    @precondition(lambda self: self.harness is not None)
    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0]))
    def wait(self, seconds: float) -> None:
        assert self.harness is not None
        self.harness.clock.advance(seconds)

    @precondition(lambda self: self.harness is not None)
    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        assert self.harness is not None
        for _ in range(count):
            self.harness.step()

    @invariant()
    def everything_fits_together(self) -> None:
        if self.harness is not None:
            self.harness.scheduler.check()

    def teardown(self) -> None:
        if self.harness is not None:
            self.harness.run()
            self.harness.verify()


SchedulerMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestSchedulerMachine = pytest.mark.timeout(120)(SchedulerMachine.TestCase)
