from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from pageflight.core.stats import CoreStats
from pageflight.obs.core_metrics import CoreMetrics
from pageflight.obs.exporter import Kind
from pageflight.obs.metrics import MetricsFlusher, RequestMetrics, ServingObserver

LABELS = {"model": "m", "version": "1"}
Key = tuple[str, tuple[tuple[str, str], ...]]


class Series:
    """A metric that refuses what Triton's kinds do not support, and counts exchanges."""

    def __init__(self, exporter: Recorder, kind: Kind) -> None:
        self._exporter, self._kind = exporter, kind
        self.value = 0.0
        self.observed: list[float] = []
        self.is_published = False

    def publish(self) -> None:
        self.is_published = True
        self._exporter.exchanges += 1

    def increment(self, value: float) -> None:
        assert self._kind == "counter"
        assert value >= 0
        self._exporter.exchanges += 1
        self.value += value

    def set(self, value: float) -> None:
        assert self._kind == "gauge"
        self._exporter.exchanges += 1
        self.value = value

    def observe(self, value: float) -> None:
        assert self._kind == "histogram"
        self._exporter.exchanges += 1
        self.observed.append(value)


class Recorder:
    def __init__(self) -> None:
        self.series: dict[Key, Series] = {}
        self.exchanges = 0

    def metric(
        self, kind: Kind, name: str, description: str, labels: Mapping[str, str], buckets: Sequence[float] = ()
    ) -> Series:
        return self.series.setdefault((name, tuple(sorted(labels.items()))), Series(self, kind))

    def get(self, name: str, **labels: str) -> Series:
        return self.series[name, tuple(sorted({**LABELS, **labels}.items()))]


def test_nothing_is_exchanged_before_a_flush() -> None:
    """An exchange with Triton in the token path cost more than sampling the token."""
    recorder = Recorder()
    requests, core = RequestMetrics(recorder, LABELS), CoreMetrics(recorder, LABELS, is_ready=lambda: True)
    observer = ServingObserver(requests, core)
    observer.first_token(0.1)
    observer.inter_token(0.02, 4)
    observer.finished("stop", 1.0, 0.1, 10, 20)
    observer.refused("QueueFull")
    observer.core_stats(CoreStats(steps=5, num_blocks=10))
    assert recorder.exchanges == 0


def test_a_flush_without_news_exchanges_nothing() -> None:
    recorder = Recorder()
    requests, core = RequestMetrics(recorder, LABELS), CoreMetrics(recorder, LABELS, is_ready=lambda: True)
    requests.first_token(0.1)
    for source in (requests, core):
        source.flush()
    before = recorder.exchanges
    for source in (requests, core):
        source.flush()
    assert recorder.exchanges == before


def test_many_tokens_cost_few_exchanges() -> None:
    recorder = Recorder()
    requests = RequestMetrics(recorder, LABELS)
    requests.flush()
    before = recorder.exchanges
    for index in range(10_000):
        requests.inter_token(0.001 * (index % 50 + 1), 1)
    requests.flush()
    assert recorder.exchanges - before <= 20


def test_joined_tokens_count_each_with_their_share_of_the_time() -> None:
    """Four tokens that came together 80 ms after the last were counted as one gap of 80 ms."""
    recorder = Recorder()
    requests = RequestMetrics(recorder, LABELS)
    requests.inter_token(0.08, 4)
    requests.flush()
    name = "pageflight_inter_token_seconds"
    assert recorder.get(f"{name}_count").value == 4
    assert abs(recorder.get(f"{name}_sum").value - 0.08) < 1e-9
    assert recorder.get(f"{name}_bucket", le="0.01").value == 0
    assert recorder.get(f"{name}_bucket", le="0.025").value == 4
    assert recorder.get(f"{name}_bucket", le="+Inf").value == 4


def test_gauges_follow_and_counters_add_up() -> None:
    recorder = Recorder()
    core = CoreMetrics(recorder, LABELS, is_ready=lambda: True)
    core.core_stats(CoreStats(steps=3, num_blocks=10, num_free_blocks=4, generated_tokens=30, max_num_seqs=8))
    core.flush()
    core.core_stats(
        CoreStats(
            steps=4,
            num_blocks=10,
            num_free_blocks=10,
            generated_tokens=45,
            max_num_seqs=8,
            num_waiting_tokens=70,
            queue_wait_s=1.5,
        )
    )
    core.flush()
    assert recorder.get("pageflight_queue_tokens").value == 70
    assert recorder.get("pageflight_queue_wait_seconds").value == 1.5
    blocks = "nv_trt_llm_kv_cache_block_metrics"
    assert recorder.get(blocks, kv_cache_block_type="used").value == 0
    assert recorder.get(blocks, kv_cache_block_type="max").value == 10
    assert recorder.get("nv_trt_llm_request_metrics", request_type="max").value == 8
    assert recorder.get("pageflight_generated_tokens_total").value == 45


def test_the_levels_of_the_cache_are_counted_apart() -> None:
    """Whether host memory is worth its bytes could not be told from the sum of both levels."""
    recorder = Recorder()
    core = CoreMetrics(recorder, LABELS, is_ready=lambda: True)
    counts = {"queried_tokens": 100, "device_cached_tokens": 30, "host_cached_tokens": 20, "saved_s": 1.5}
    moves = {"swaps_out": 3, "swaps_in": 2, "blocks_copied_out": 9, "blocks_copied_in": 7}
    core.core_stats(CoreStats(steps=1, num_host_blocks=50, num_free_host_blocks=40, **counts, **moves))
    core.flush()
    hits, swaps, blocks = "pageflight_prefix_cache_hits_total", "pageflight_kv_swaps_total", "pageflight_kv_host_blocks"
    assert recorder.get("pageflight_prefix_cache_queries_total").value == 100
    assert recorder.get(hits, level="device").value == 30 and recorder.get(hits, level="host").value == 20
    assert recorder.get("pageflight_prefix_cache_saved_seconds_total").value == 1.5
    assert recorder.get(swaps, direction="out").value == 3 and recorder.get(swaps, direction="in").value == 2
    assert recorder.get("pageflight_kv_copied_blocks_total", direction="in").value == 7
    assert recorder.get(blocks, kind="used").value == 10 and recorder.get(blocks, kind="max").value == 50


def test_counters_go_on_after_a_core_was_restarted() -> None:
    """The new core counts from zero; the difference to the old one's total was negative."""
    recorder = Recorder()
    core = CoreMetrics(recorder, LABELS, is_ready=lambda: True)
    core.core_stats(CoreStats(steps=100, generated_tokens=500))
    core.flush()
    core.restarted(2)
    core.core_stats(CoreStats(steps=2, generated_tokens=7, recomputed_tokens=40))
    core.flush()
    assert recorder.get("pageflight_generated_tokens_total").value == 507
    assert recorder.get("pageflight_recomputed_tokens_total").value == 40
    assert recorder.get("pageflight_engine_restarts_total").value == 2


def test_tokens_computed_again_are_counted_once_for_all_models() -> None:
    """The core counted them, and the front of the core's own model added its estimate of the same."""
    recorder = Recorder()
    requests, core = RequestMetrics(recorder, LABELS), CoreMetrics(recorder, LABELS, is_ready=lambda: True)
    observer = ServingObserver(requests, core)
    observer.restarted(1, 3)
    observer.core_stats(CoreStats(steps=2, recomputed_tokens=70))
    for source in (requests, core):
        source.flush()
    assert recorder.get("pageflight_recomputed_tokens_total").value == 70
    assert recorder.get("pageflight_replayed_sequences_total").value == 3


def test_readiness_is_asked_at_every_flush() -> None:
    """A gauge that only the core's reports moved stayed at 1 when there was no core to report."""
    recorder, states = Recorder(), [True, False, False, True]
    core = CoreMetrics(recorder, LABELS, is_ready=lambda: states.pop(0))
    seen = []
    for _ in range(4):
        core.flush()
        seen.append(recorder.get("pageflight_engine_ready").value)
    assert seen == [1.0, 0.0, 0.0, 1.0]


def test_refusals_and_answers_are_counted_by_reason() -> None:
    recorder = Recorder()
    requests = RequestMetrics(recorder, LABELS)
    requests.refused("QueueFull")
    requests.refused("QueueFull")
    requests.finished("length", 1.0, 0.0, 3, 4)
    requests.flush()
    assert recorder.get("pageflight_refusals_total", reason="QueueFull").value == 2
    assert recorder.get("pageflight_answers_total", reason="length").value == 1
    lengths = recorder.get("nv_llm_output_token_len", response_metric_type="total_output_tokens")
    assert lengths.observed == [4]


def test_series_are_visible_before_anything_happened() -> None:
    recorder = Recorder()
    requests, core = RequestMetrics(recorder, LABELS), CoreMetrics(recorder, LABELS, is_ready=lambda: True)
    requests.flush()
    core.flush()
    missing = [key for key, series in recorder.series.items() if not (series.is_published or series._kind == "gauge")]
    assert not missing


class Noticed:
    """A source that tells when it was flushed."""

    def __init__(self) -> None:
        self.was_flushed = threading.Event()

    def flush(self) -> None:
        self.was_flushed.set()


def test_flusher_publishes_what_is_left_at_the_end() -> None:
    recorder = Recorder()
    requests, noticed = RequestMetrics(recorder, LABELS), Noticed()
    flusher = MetricsFlusher((requests, noticed), interval_s=0.2, start_delay_s=0.0)
    flusher.start()
    assert noticed.was_flushed.wait(10)
    requests.first_token(0.5)
    flusher.close()
    assert recorder.get("pageflight_time_to_first_token_seconds").observed == [0.5]


def test_metrics_that_fail_once_are_published_later() -> None:
    """One failed exchange ended the thread, and the gauges stood still for ever."""

    class Failing:
        calls = 0

        def flush(self) -> None:
            self.calls += 1
            if self.calls == 1:
                raise RuntimeError("the server did not answer")

    failing, noticed = Failing(), Noticed()
    flusher = MetricsFlusher((failing, noticed), interval_s=0.01, start_delay_s=0.0)
    flusher.start()
    assert noticed.was_flushed.wait(10)
    flusher.close()
    assert failing.calls >= 2


def test_flusher_that_never_started_can_be_closed() -> None:
    MetricsFlusher(()).close()
