"""A snapshot of the core for metrics: gauges as they are, counters since the core started."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreStats:
    # gauges
    num_running: int = 0  # sequences that hold a row
    num_context: int = 0  # of them, still computing their prompt
    num_waiting: int = 0
    num_waiting_tokens: int = 0  # prompt tokens of waiting sequences
    queue_wait_s: float = 0.0  # estimated time until what waits now has been started; 0 also while unknown
    num_preempted: int = 0  # waiting sequences that had a row before
    max_num_seqs: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0  # free or evictable
    num_host_blocks: int = 0  # of the cache's second level
    num_free_host_blocks: int = 0  # free or evictable: no swapped sequence needs them
    block_size: int = 0
    last_step_context_tokens: int = 0
    last_step_generation_rows: int = 0
    cpu_memory_bytes: int = 0  # weights and cache
    gpu_memory_bytes: int = 0
    pinned_memory_bytes: int = 0
    pipeline_idle_share: float = 0.0  # of the time in which steps were under way, what stages did not compute
    # counters
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    device_cached_tokens: int = 0  # of them, in its first level
    host_cached_tokens: int = 0  # of them, in its second
    queried_tokens: int = 0  # prompt tokens that were looked for in the prefix cache
    saved_s: float = 0.0  # estimate of the time that cached tokens did not take
    recomputed_tokens: int = 0
    reused_blocks: int = 0
    preemptions: int = 0
    swaps_out: int = 0
    swaps_in: int = 0
    blocks_copied_out: int = 0
    blocks_copied_in: int = 0
    cancellations: int = 0
    memory_shortages: int = 0  # steps that ran only after something was given up
    refusals: dict[str, int] = field(default_factory=dict)  # by reason
