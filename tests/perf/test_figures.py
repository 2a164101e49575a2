from pathlib import Path

import pytest
from perf.workload import Workload

from perf import figures


def test_percentiles_are_values_that_were_measured() -> None:
    """Nearest rank: no interpolation between two requests that never took that long."""
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [figures.percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 3.0, 5.0, 5.0]
    assert figures.percentile([], 0.5) != figures.percentile([], 0.5)  # NaN


def test_figures_of_known_answers() -> None:
    """Time per token leaves the first one out; tokens/s counts what arrived, not what was asked for."""
    answers = [
        figures.Answer(10.0, [10.5, 10.6, 10.7, 10.8], num_input=8, num_output=4),
        figures.Answer(10.0, [11.0, 11.3], num_input=8, num_output=4),  # three tokens joined in the last response
    ]
    record = figures.summarise(Workload.parse("uniq:2:2:8:4"), answers, wall_s=2.0, cpu_s=0.1, seed=1)
    assert record["tok_s"] == 4.0
    assert record["ttft_p50_ms"] == 500.0 and record["ttft_p99_ms"] == 1000.0
    assert record["tpot_p50_ms"] == 100.0
    assert record["maxgap_ms"] == 300.0
    assert record["responses"] == 6 and record["out_ok"] and record["in_ok"]


def test_an_answer_that_never_came_is_noticed() -> None:
    """The last request of a run was dropped and its tokens were not missed."""
    answers = [figures.Answer(0.0, [1.0], num_input=8, num_output=1)]
    record = figures.summarise(Workload.parse("uniq:1:2:8:1"), answers, wall_s=1.0, cpu_s=0.0, seed=1)
    assert not record["out_ok"]


def test_results_are_read_back_and_a_broken_line_is_named(tmp_path: Path) -> None:
    """A run that was killed left half a line, and the report a traceback without a place."""
    path = tmp_path / "results" / "a.jsonl"
    figures.append(path, {"tok_s": 1.5})
    figures.append(path, {"tok_s": 2.5})
    assert figures.read([path]) == [{"tok_s": 1.5}, {"tok_s": 2.5}]
    path.write_text(path.read_text() + '{"tok_s"')
    with pytest.raises(ValueError, match=r"a\.jsonl:3"):
        figures.read([path])
