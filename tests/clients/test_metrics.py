from __future__ import annotations

import time

from servers import Server

PROMPT = "the quick brown fox jumps"

TRT_LLM = {
    "nv_trt_llm_request_metrics": ("request_type", ("active", "max", "scheduled", "context", "waiting")),
    "nv_trt_llm_runtime_memory_metrics": ("memory_type", ("cpu", "gpu", "pinned")),
    "nv_trt_llm_kv_cache_block_metrics": (
        "kv_cache_block_type",
        ("max", "free", "used", "tokens_per", "reused", "fraction"),
    ),
    "nv_trt_llm_inflight_batcher_metrics": (
        "inflight_batcher_specific_metric",
        ("total_context_tokens", "generation_requests", "paused_requests", "micro_batch_id"),
    ),
    "nv_trt_llm_general_metrics": ("general_type", ("timestamp", "iteration_counter")),
}


def labels(series: str) -> dict[str, str]:
    inside = series.partition("{")[2].rstrip("}")
    return {name: value.strip('"') for name, _, value in (pair.partition("=") for pair in inside.split(","))}


def test_every_tensorrt_llm_gauge_is_there_with_its_labels(server: Server) -> None:
    """Triton's ORCA header and routers find them by exactly these names and labels."""
    found = {(s.partition("{")[0], *sorted(labels(s).items())) for s in server.metrics()}
    for name, (label, kinds) in TRT_LLM.items():
        for kind in kinds:
            assert (name, *sorted({"model": "engine", "version": "1", label: kind}.items())) in found


def gauge(server: Server, name: str, kind: str) -> float:
    (value,) = (v for s, v in server.metrics().items() if s.startswith(name) and kind in labels(s).values())
    return value


def test_block_gauges_describe_one_pool(server: Server) -> None:
    name = "nv_trt_llm_kv_cache_block_metrics"
    values = {kind: gauge(server, name, kind) for kind in ("max", "free", "used", "tokens_per", "fraction")}
    assert values["max"] == values["free"] + values["used"] > 0
    assert values["tokens_per"] > 0
    assert gauge(server, "nv_trt_llm_request_metrics", "max") == 32


def total(server: Server, name: str, **wanted: str) -> float:
    return sum(
        value
        for series, value in server.metrics().items()
        if series.partition("{")[0] == name and labels(series).items() >= wanted.items()
    )


def test_a_request_is_counted_once_everywhere(server: Server) -> None:
    names = {
        "nv_llm_input_token_len_count": {"response_metric_type": "total_input_tokens"},
        "nv_llm_output_token_len_sum": {"response_metric_type": "total_output_tokens"},
        "pageflight_time_to_first_token_seconds_count": {},
        "pageflight_queue_seconds_count": {},
        "pageflight_end_to_end_seconds_count": {},
        "pageflight_answers_total": {"reason": "length"},
        "pageflight_generated_tokens_total": {},
    }
    time.sleep(1.2)
    before = {name: total(server, name, **wanted) for name, wanted in names.items()}
    assert server.text(text_input=PROMPT, max_tokens=7, ignore_eos=True) != ""
    end = time.monotonic() + 8
    expected = dict.fromkeys(names, 1.0)
    expected |= {"nv_llm_output_token_len_sum": 7.0, "pageflight_generated_tokens_total": 7.0}
    counted: dict[str, float] = {}
    while counted != expected and time.monotonic() < end:
        counted = {name: total(server, name, **wanted) - before[name] for name, wanted in names.items()}
        time.sleep(0.1)
    assert counted == expected


def test_refusals_are_counted_by_reason(server: Server) -> None:
    time.sleep(1.2)
    before = total(server, "pageflight_refusals_total", reason="PromptTooLong")
    assert server.generate(text_input="XY" * 600).status_code == 400
    end = time.monotonic() + 8
    while total(server, "pageflight_refusals_total", reason="PromptTooLong") == before:
        assert time.monotonic() < end, "the refusal was not counted"
        time.sleep(0.1)


def test_inter_token_buckets_are_cumulative(server: Server) -> None:
    """Published as counters, they must still be what a histogram's buckets are."""
    name = "pageflight_inter_token_seconds_bucket"
    buckets = {
        float(labels(s)["le"]): v
        for s, v in server.metrics().items()
        if s.startswith(name) and labels(s)["model"] == server.name
    }
    values = [buckets[edge] for edge in sorted(buckets)]
    assert values == sorted(values)
    assert values[-1] > 0
