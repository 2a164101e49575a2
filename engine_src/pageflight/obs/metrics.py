"""What a front and its core have to tell, as metrics: an `Observer` that only counts, flushed by a thread of its own.

The names `nv_trt_llm_…` and `nv_llm_…` are TensorRT-LLM's, which routers and dashboards read already. Ours begin with
`pageflight_`. Counting costs well under a microsecond; a flush is one exchange per changed series, twice a second.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import ClassVar, Protocol

from pageflight.core.stats import CoreStats
from pageflight.obs.core_metrics import CoreMetrics
from pageflight.obs.exporter import Exporter
from pageflight.obs.series import Counter, RequestHistogram, TokenHistogram

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

    _BY_LABEL: ClassVar[dict[str, tuple[str, str]]] = {
        "pageflight_answers_total": ("reason", "Answers that ended, by finish reason"),
        "pageflight_refusals_total": ("reason", "Requests refused, by error"),
        "pageflight_routed_requests_total": ("instance", "Requests by the instance whose core they went to"),
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
        self._replayed = self._counter(
            "pageflight_replayed_sequences_total", "Open sequences that a restarted engine core took over"
        )
        self._poisoned = self._counter(
            "pageflight_poison_requests_total", "Sequences given up because every engine core died in their steps"
        )
        self._rerouted = self._counter(
            "pageflight_rerouted_sequences_total",
            "Open sequences that another instance's engine core took over",
        )
        self._lock = threading.Lock()  # refusals come from several threads
        self._totals: dict[tuple[str, str], int] = {}
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

    def replayed(self, num_sequences: int) -> None:
        self._replayed.total += num_sequences

    def poisoned(self) -> None:
        self._poisoned.total += 1

    def routed(self, instance: int) -> None:
        self._count("pageflight_routed_requests_total", str(instance))

    def rerouted(self, num_sequences: int) -> None:
        self._rerouted.total += num_sequences

    def flush(self) -> None:
        histograms = (self._first_token, self._queue, self._end_to_end, self._input_length, self._output_length)
        for histogram in histograms:
            histogram.flush()
        self._inter_token.flush()
        self._replayed.flush()
        self._poisoned.flush()
        self._rerouted.flush()
        with self._lock:
            totals = dict(self._totals)
        for (name, value), total in totals.items():
            counter = self._counters.get((name, value))
            if counter is None:
                label, description = self._BY_LABEL[name]
                labels = {**self._labels, label: value}
                counter = Counter(self._exporter.metric("counter", name, description, labels))
                self._counters[name, value] = counter
            counter.total = total
            counter.flush()

    def _histogram(self, name: str, description: str, buckets: tuple[float, ...], **labels: str) -> RequestHistogram:
        return RequestHistogram(
            self._exporter.metric("histogram", name, description, {**self._labels, **labels}, buckets)
        )

    def _counter(self, name: str, description: str) -> Counter:
        return Counter(self._exporter.metric("counter", name, description, self._labels))

    def _count(self, name: str, value: str) -> None:
        with self._lock:
            self._totals[name, value] = self._totals.get((name, value), 0) + 1


class ServingObserver:
    """The `loop.observer.RoutingObserver` of a model instance: its requests, and its core's state if it owns one."""

    def __init__(self, requests: RequestMetrics, core: CoreMetrics | None) -> None:
        self._core, self._requests = core, requests
        self.poisoned = requests.poisoned
        self.first_token = requests.first_token
        self.inter_token = requests.inter_token
        self.finished = requests.finished
        self.refused = requests.refused
        self.routed = requests.routed
        self.rerouted = requests.rerouted

    def core_stats(self, stats: CoreStats) -> None:
        if self._core is not None:
            self._core.core_stats(stats)

    def restarted(self, num_restarts: int, num_replayed: int) -> None:
        self._requests.replayed(num_replayed)
        if self._core is not None:
            self._core.restarted(num_restarts)


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
