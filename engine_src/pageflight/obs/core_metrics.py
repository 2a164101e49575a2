"""The core's state as metrics, as its reports bring it.

Triton's ORCA header and routers find TensorRT-LLM's names by their labels; what a prefix cache is asked and finds is
counted in tokens, as vLLM counts it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from pageflight.core.stats import CoreStats
from pageflight.obs.exporter import Exporter
from pageflight.obs.series import Counter, Gauge


class CoreMetrics:
    """The core's gauges and counters, published by the model that owns the core."""

    _GAUGES = (
        ("nv_trt_llm_request_metrics", "request_type", ("active", "max", "scheduled", "context", "waiting")),
        ("nv_trt_llm_runtime_memory_metrics", "memory_type", ("cpu", "gpu", "pinned")),
        (
            "nv_trt_llm_kv_cache_block_metrics",
            "kv_cache_block_type",
            ("max", "free", "used", "tokens_per", "reused", "fraction"),
        ),
        (
            "nv_trt_llm_inflight_batcher_metrics",
            "inflight_batcher_specific_metric",
            ("total_context_tokens", "generation_requests", "paused_requests", "micro_batch_id"),
        ),
        ("nv_trt_llm_general_metrics", "general_type", ("timestamp", "iteration_counter")),
        ("pageflight_kv_host_blocks", "kind", ("max", "free", "used")),
    )
    _PLAIN_GAUGES = (
        ("num_waiting_tokens", "pageflight_queue_tokens", "Prompt tokens of sequences that wait"),
        ("queue_wait_s", "pageflight_queue_wait_seconds", "Estimated time until what waits now has been started"),
        ("pipeline_idle_share", "pageflight_pipeline_idle_share", "Share of a step's time that stages wait"),
    )
    _COUNTERS: tuple[tuple[str, str, str, dict[str, str]], ...] = (
        ("prompt_tokens", "prompt_tokens", "Prompt tokens computed or found in the cache", {}),
        ("generated_tokens", "generated_tokens", "Output tokens", {}),
        ("cached_tokens", "cached_tokens", "Prompt tokens found in the prefix cache", {}),
        ("recomputed_tokens", "recomputed_tokens", "Tokens computed again after preemption or a restart", {}),
        ("preemptions", "preemptions", "Sequences that lost their row", {}),
        ("cancellations", "cancellations", "Sequences ended by their client", {}),
        ("memory_shortages", "memory_shortages", "Steps that ran only after the device's memory was cleared", {}),
        ("queried_tokens", "prefix_cache_queries", "Prompt tokens looked for in the prefix cache", {}),
        ("device_cached_tokens", "prefix_cache_hits", "Prompt tokens found in the prefix cache", {"level": "device"}),
        ("host_cached_tokens", "prefix_cache_hits", "Prompt tokens found in the prefix cache", {"level": "host"}),
        ("saved_s", "prefix_cache_saved_seconds", "Estimated time of computing what was found", {}),
        ("swaps_out", "kv_swaps", "Sequences whose blocks moved between cache and host memory", {"direction": "out"}),
        ("swaps_in", "kv_swaps", "Sequences whose blocks moved between cache and host memory", {"direction": "in"}),
        ("blocks_copied_out", "kv_copied_blocks", "Blocks copied between cache and host memory", {"direction": "out"}),
        ("blocks_copied_in", "kv_copied_blocks", "Blocks copied between cache and host memory", {"direction": "in"}),
    )
    """Number of `CoreStats`, name without `pageflight_` and `_total`, description, labels."""

    def __init__(self, exporter: Exporter, labels: Mapping[str, str], *, is_ready: Callable[[], bool]) -> None:
        """`is_ready` is asked at every flush, by its thread."""
        self._is_ready = is_ready
        self._gauges = {
            (name, kind): Gauge(exporter.metric("gauge", name, f"By {label}", {**labels, label: kind}))
            for name, label, kinds in self._GAUGES
            for kind in kinds
        }
        self._plain_gauges = {
            field: Gauge(exporter.metric("gauge", name, description, labels))
            for field, name, description in self._PLAIN_GAUGES
        }
        self._counters = {
            number: Counter(
                exporter.metric("counter", f"pageflight_{name}_total", description, {**labels, **own_labels})
            )
            for number, name, description, own_labels in self._COUNTERS
        }
        self._restarts = Counter(
            exporter.metric("counter", "pageflight_engine_restarts_total", "Engine cores started again", labels)
        )
        self._ready = Gauge(
            exporter.metric("gauge", "pageflight_engine_ready", "1 while an engine core takes requests, else 0", labels)
        )
        self._seen = CoreStats()

    def core_stats(self, stats: CoreStats) -> None:
        num_used = stats.num_blocks - stats.num_free_blocks
        values: dict[str, tuple[float, ...]] = {
            "nv_trt_llm_request_metrics": (
                stats.num_running + stats.num_waiting,
                stats.max_num_seqs,
                stats.num_running,
                stats.num_context,
                stats.num_waiting,
            ),
            "nv_trt_llm_runtime_memory_metrics": (
                stats.cpu_memory_bytes,
                stats.gpu_memory_bytes,
                stats.pinned_memory_bytes,
            ),
            "nv_trt_llm_kv_cache_block_metrics": (
                stats.num_blocks,
                stats.num_free_blocks,
                num_used,
                stats.block_size,
                stats.reused_blocks,
                num_used / stats.num_blocks if stats.num_blocks else 0.0,
            ),
            "nv_trt_llm_inflight_batcher_metrics": (
                stats.last_step_context_tokens,
                stats.last_step_generation_rows,
                stats.num_preempted,
                0,
            ),
            "nv_trt_llm_general_metrics": (int(time.time()), stats.steps),
            "pageflight_kv_host_blocks": (
                stats.num_host_blocks,
                stats.num_free_host_blocks,
                stats.num_host_blocks - stats.num_free_host_blocks,
            ),
        }
        for name, _, kinds in self._GAUGES:
            for kind, value in zip(kinds, values[name], strict=True):
                self._gauges[name, kind].value = value
        for field, gauge in self._plain_gauges.items():
            gauge.value = getattr(stats, field)
        is_new_core = stats.steps < self._seen.steps
        for name, counter in self._counters.items():
            counter.total += getattr(stats, name) - (0 if is_new_core else getattr(self._seen, name))
        self._seen = stats

    def restarted(self, num_restarts: int) -> None:
        self._seen = CoreStats()
        self._restarts.total += num_restarts

    def flush(self) -> None:
        for gauge in (*self._gauges.values(), *self._plain_gauges.values()):
            gauge.flush()
        for counter in self._counters.values():
            counter.flush()
        self._restarts.flush()
        self._ready.value = float(self._is_ready())
        self._ready.flush()
