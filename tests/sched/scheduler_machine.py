"""Random arrivals, cancels, deadlines, limits and tiny caches; everything is checked after every step."""

from __future__ import annotations

from typing import Any, get_args

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sched_harness import Harness

from pageflight.core.config import KVAdmission, SchedulingPolicy
from pageflight.core.errors import PageflightError, PromptTooLong, QueueFull
from pageflight.core.tenants import Tenants, TenantShare
from pageflight.loop.recorder import Recorder

# Few different tokens and common beginnings, so that prefixes meet and blocks are shared.
BEGINNINGS = st.sampled_from([(), (1, 2, 3, 4), (1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9), (7,) * 6])
PROMPTS = st.builds(
    lambda beginning, rest: (*beginning, *rest),
    BEGINNINGS,
    st.lists(st.integers(0, 2), min_size=1, max_size=9),
)
SHARES = st.builds(
    TenantShare,
    weight=st.sampled_from([0.5, 1.0, 4.0]),
    max_waiting=st.sampled_from([None, None, 0, 1, 3]),
    max_running=st.sampled_from([None, None, 1, 2]),
    kv_share=st.sampled_from([1.0, 1.0, 0.5]),
)
TENANTS = st.builds(Tenants, default=SHARES, by_name=st.dictionaries(st.sampled_from(["a", "b"]), SHARES))

SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "max_num_tokens": st.integers(0, 12),  # beyond one for each row
    "max_num_seqs": st.integers(1, 5),
    "max_model_len": st.just(48),
    "max_queue_size": st.integers(1, 8),
    "token_tile": st.sampled_from([1, 1, 4]),
    "deterministic": st.booleans(),
    "replay_rows": st.sampled_from([1, 3, 100]),
    "scheduling_policy": st.sampled_from(get_args(SchedulingPolicy)),
    "ageing_s": st.sampled_from([0.0, 1.0, 60.0]),
    "max_queue_tokens": st.sampled_from([0, 0, 30]),
    "kv_admission": st.sampled_from(get_args(KVAdmission)),
    "kv_watermark": st.sampled_from([0.0, 0.2]),
    "target_inter_token_ms": st.sampled_from([0.0, 0.0, 1.0, 900.0]),
    "tenants": TENANTS,
    "block_size": st.sampled_from([1, 2, 4]),
    "num_blocks": st.integers(6, 30),
    "prefix_cache": st.booleans(),
    "num_host_blocks": st.sampled_from([0, 3, 12, 60]),
    "host_copy_s": st.sampled_from([0.0, 1e-5, 1e-3]),
}
"""Every setting of a scheduler and its cache, small enough that all of them matter."""
RESOLVED = {"memory_bytes", "host_memory_bytes", "gpu_memory_utilization"}
"""Settings that are turned into others before a scheduler sees them."""


def arranged(drawn: dict[str, Any]) -> dict[str, Any]:
    """Settings that a scheduler accepts."""
    block_size = max(2, drawn["block_size"]) if drawn["deterministic"] else drawn["block_size"]
    return {**drawn, "max_num_tokens": drawn["max_num_seqs"] + drawn["max_num_tokens"], "block_size": block_size}


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of requests and steps: no block is lost, each sequence ends once, with the tokens it has alone."""

    recorder: Recorder | None = None

    def __init__(self) -> None:
        super().__init__()
        self.harness: Harness | None = None

    @initialize(settings=st.fixed_dictionaries(SETTINGS), ahead=st.sampled_from([0, 0, 1, 2]))
    def build(self, settings: dict[str, Any], ahead: int) -> None:
        self.harness = Harness(**arranged(settings), ahead=ahead, step_s=0.001, recorder=self.recorder)

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
        tenant=st.sampled_from(["", "", "a", "b"]),
        cache_salt=st.sampled_from(["", "", "s"]),
        kv_retention_priority=st.sampled_from([None, None, 0, 35, 80, 100]),
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
        kv_retention_priority: int | None,
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
                kv_retention_priority=kv_retention_priority,
            )
        except PromptTooLong as error:
            assert len(prompt) + max_tokens > harness.scheduler.limits.max_sequence_len or "share" in str(error)
        except QueueFull as error:
            stats, size_limit = harness.scheduler.stats(), harness.config.max_queue_size
            is_over_tokens = stats.num_waiting_tokens + len(prompt) > error.limit
            assert stats.num_waiting + n > size_limit or error.tenant is not None or is_over_tokens
        except PageflightError:
            assert n > harness.config.max_queue_size

    @precondition(lambda self: self.harness is not None and self.harness.requests)
    @rule(data=st.data(), num_kept=st.integers(0, 6), trial_tokens=st.sampled_from([0, 2, 7]))
    def take_over(self, data: st.DataObject, num_kept: int, trial_tokens: int) -> None:
        """A sequence comes back with some of its output, as after a restart of the core."""
        assert self.harness is not None
        harness = self.harness
        handle = data.draw(st.sampled_from(sorted(harness.requests)))
        request = harness.requests[handle]
        if request.output_ids:
            return
        expected = harness.expected(handle)
        harness.submit(
            request.prompt_ids,
            trial_tokens=trial_tokens,
            is_taken_over=True,
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
    @rule(tenants=TENANTS)
    def change_tenants(self, tenants: Tenants) -> None:
        """The operator edits the tenants file."""
        assert self.harness is not None
        self.harness.scheduler.set_tenants(tenants)

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
            is_quiet = not any(request.trial_tokens for request in self.harness.requests.values())
            if self.harness.config.kv_admission == "reserve" and is_quiet:
                assert self.harness.scheduler.stats().preemptions == 0, "a reserved block was not there"

    def teardown(self) -> None:
        if self.harness is not None:
            self.harness.run()
            self.harness.verify()
