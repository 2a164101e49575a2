"""What a front and its core have to tell, as metrics: an `Observer` that only counts, flushed by a thread of its own.

The names `nv_trt_llm_…` and `nv_llm_…` are TensorRT-LLM's, which routers and dashboards read already. Ours begin with
`pageflight_`. Counting costs well under a microsecond; a flush is one exchange per changed series, twice a second.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import ClassVar, Protocol

from pageflight.core.stats import CoreStats
from pageflight.obs.exporter import Exporter
from pageflight.obs.series import Counter, Gauge, RequestHistogram, TokenHistogram

log = logging.getLogger(__name__)

FLUSH_INTERVAL_S = 0.5
START_DELAY_S = 1.5
"""Nothing is published before: exchanges with a server that is still loading this model have brought it down."""
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKENS = (10.0, 50.0, 100.0, 500.0, 1000.0)


class Flushed(Protocol):
    """Something that `MetricsFlusher` publishes."""

    def flush(self) -> None: ...


class RequestMetrics:
    """Times and counts of the requests that came through one Triton model instance."""

    _BY_REASON: ClassVar[dict[str, str]] = {
        "pageflight_answers_total": "Answers that ended, by finish reason",
        "pageflight_refusals_total": "Requests refused, by error",
    }

    def __init__(self, exporter: Exporter, labels: Mapping[str, str]) -> None:
        self._exporter, self._labels = exporter, dict(labels)
        self._first_token = self._histogram(
            "pageflight_time_to_first_token_seconds", "From arrival to the first output token", SECONDS
        )
        self._queue = self._histogram("pageflight_queue_seconds", "From arrival until first scheduled", SECONDS)
        self._end_to_end = self._histogram("pageflight_end_to_end_seconds", "From arrival to the last token", SECONDS)
        self._input_length = self._histogram(
            "nv_llm_input_token_len", "Prompt tokens per request", TOKENS, response_metric_type="total_input_tokens"
        )
        self._output_length = self._histogram(
            "nv_llm_output_token_len", "Output tokens per answer", TOKENS, response_metric_type="total_output_tokens"
        )
        self._inter_token = TokenHistogram(
            exporter, "pageflight_inter_token_seconds", "Between output tokens of an answer", labels, SECONDS
        )
        self._lock = threading.Lock()  # refusals come from several threads
        self._reasons: dict[tuple[str, str], int] = {}
        self._counters: dict[tuple[str, str], Counter] = {}

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def inter_token(self, seconds: float, count: int) -> None:
        self._inter_token.observe(seconds / count, count)

    def finished(
        self, reason: str, end_to_end_s: float, queue_s: float, num_input_tokens: int, num_output_tokens: int
    ) -> None:
        self._end_to_end.observe(end_to_end_s)
        self._queue.observe(queue_s)
        self._input_length.observe(num_input_tokens)
        self._output_length.observe(num_output_tokens)
        self._count("pageflight_answers_total", reason)

    def refused(self, reason: str) -> None:
        self._count("pageflight_refusals_total", reason)

    def flush(self) -> None:
        histograms = (self._first_token, self._queue, self._end_to_end, self._input_length, self._output_length)
        for histogram in histograms:
            histogram.flush()
        self._inter_token.flush()
        with self._lock:
            reasons = dict(self._reasons)
        for (name, reason), total in reasons.items():
            counter = self._counters.get((name, reason))
            if counter is None:
                labels = {**self._labels, "reason": reason}
                counter = Counter(self._exporter.metric("counter", name, self._BY_REASON[name], labels))
                self._counters[name, reason] = counter
            counter.total = total
            counter.flush()

    def _histogram(self, name: str, description: str, buckets: tuple[float, ...], **labels: str) -> RequestHistogram:
        return RequestHistogram(
            self._exporter.metric("histogram", name, description, {**self._labels, **labels}, buckets)
        )

    def _count(self, name: str, reason: str) -> None:
        with self._lock:
            self._reasons[name, reason] = self._reasons.get((name, reason), 0) + 1


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
    )
    _COUNTERS = (
        ("prompt_tokens", "Prompt tokens computed or found in the cache"),
        ("generated_tokens", "Output tokens"),
        ("cached_tokens", "Prompt tokens found in the prefix cache"),
        ("recomputed_tokens", "Tokens computed again after preemption or a restart"),
        ("preemptions", "Sequences that lost their row"),
        ("cancellations", "Sequences ended by their client"),
    )

    def __init__(self, exporter: Exporter, labels: Mapping[str, str]) -> None:
        self._gauges = {
            (name, kind): Gauge(exporter.metric("gauge", name, f"By {label}", {**labels, label: kind}))
            for name, label, kinds in self._GAUGES
            for kind in kinds
        }
        self._counters = {
            name: Counter(exporter.metric("counter", f"pageflight_{name}_total", description, labels))
            for name, description in self._COUNTERS
        }
        self._restarts = Counter(
            exporter.metric("counter", "pageflight_engine_restarts_total", "Engine cores that took over", labels)
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
        }
        for name, _, kinds in self._GAUGES:
            for kind, value in zip(kinds, values[name], strict=True):
                self._gauges[name, kind].value = value
        is_new_core = stats.steps < self._seen.steps
        for name, counter in self._counters.items():
            counter.total += getattr(stats, name) - (0 if is_new_core else getattr(self._seen, name))
        self._seen = stats

    def restarted(self, recomputed_tokens: int) -> None:
        self._seen = CoreStats()
        self._restarts.total += 1
        self._counters["recomputed_tokens"].total += recomputed_tokens

    def flush(self) -> None:
        for gauge in self._gauges.values():
            gauge.flush()
        for counter in self._counters.values():
            counter.flush()
        self._restarts.flush()


class ServingObserver:
    """The `loop.observer.Observer` of a front: its requests, and the core's state where this front publishes it."""

    def __init__(self, requests: RequestMetrics, core: CoreMetrics | None) -> None:
        self._core = core
        self.first_token = requests.first_token
        self.inter_token = requests.inter_token
        self.finished = requests.finished
        self.refused = requests.refused

    def core_stats(self, stats: CoreStats) -> None:
        if self._core is not None:
            self._core.core_stats(stats)

    def restarted(self, recomputed_tokens: int) -> None:
        if self._core is not None:
            self._core.restarted(recomputed_tokens)


class MetricsFlusher:
    """A thread that publishes what was counted, a few times a second and once more at the end."""

    def __init__(
        self,
        sources: tuple[Flushed, ...],
        *,
        interval_s: float = FLUSH_INTERVAL_S,
        start_delay_s: float = START_DELAY_S,
    ) -> None:
        self._sources, self._interval_s, self._start_delay_s = sources, interval_s, start_delay_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        """Begin to publish; when the model is ready."""
        self._thread.start()

    def close(self) -> None:
        """Publish what is left, if publishing had begun, and end."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        if self._closing.wait(self._start_delay_s):
            return
        closing = False
        while not closing:
            closing = self._closing.wait(self._interval_s)
            try:
                for source in self._sources:
                    source.flush()
            except Exception:
                log.exception("metrics could not be published; they are tried again")
