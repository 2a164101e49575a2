import json
from pathlib import Path

import pytest
from perf.ceiling import Machine, Weights, WeightType, measure_product, tokens_per_s
from perf.workload import Workload

MACHINE = Machine(
    num_threads=2,
    read_bytes_per_s=50e9,
    flops_per_s={WeightType.bf16: 1e12, WeightType.int8: 2e12},
)
WEIGHTS = Weights(name="w", num_layer_parameters=400_000_000, num_head_parameters=100_000_000)


def test_one_stream_is_bound_by_reading_the_weights() -> None:
    """1 GB of bf16 weights at 50 GB/s: 20 ms for each token; a prompt of one token costs 0.8 ms once."""
    item = Workload.parse("uniq:1:8:1:1000")
    assert tokens_per_s(MACHINE, WEIGHTS, WeightType.bf16, item) == pytest.approx(1000 / (1000 * 0.020 + 0.0008))
    assert tokens_per_s(MACHINE, WEIGHTS, WeightType.int8, item) == pytest.approx(100, rel=0.01)


def test_many_streams_are_bound_by_arithmetic() -> None:
    """At concurrency 64 a token costs 0.31 ms of reading, but 1 GFLOP at 1 TFLOP/s: 1 ms; prompts come on top."""
    item = Workload.parse("uniq:64:64:100:100")
    assert tokens_per_s(MACHINE, WEIGHTS, WeightType.bf16, item) == pytest.approx(1 / (0.001 + 0.0008))


def test_a_shared_prefix_is_computed_once() -> None:
    """Counting it for every request puts the ceiling below what a prefix cache reaches."""
    shared = tokens_per_s(MACHINE, WEIGHTS, WeightType.bf16, Workload.parse("shared:32:32:512+32:32"))
    whole = tokens_per_s(MACHINE, WEIGHTS, WeightType.bf16, Workload.parse("uniq:32:32:544:32"))
    assert shared > 5 * whole


def test_weights_are_counted_from_the_configuration(tmp_path: Path) -> None:
    """The input embedding is looked up, not streamed; the head is, tied or not."""
    config = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 2816,
        "vocab_size": 32000,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = Weights.of_checkpoint(tmp_path)
    assert weights.step_bytes(WeightType.bf16) / 1e6 == pytest.approx(632, abs=1)
    assert weights.step_bytes(WeightType.int8) * 2 == weights.step_bytes(WeightType.bf16)


@pytest.mark.parametrize("weight_type", list(WeightType))
def test_products_of_every_weight_type_run(weight_type: WeightType) -> None:
    """A graph that OpenVINO refuses would be found at the end of an hour of measuring."""
    assert measure_product(1, weight_type, size=128, repeats=1) > 0
