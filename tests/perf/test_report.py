from pathlib import Path

from perf import report


def record(label: str, conc: int, tok_s: float, **more: object) -> dict[str, object]:
    base = {"model": "m", "kind": "uniq", "prompt": "8", "output": 4, "ttft_p50_ms": 1.0, "tpot_p50_ms": 2.0}
    return {**base, "label": label, "conc": conc, "tok_s": tok_s, **more}


def test_medians_replace_runs_and_later_records_earlier_ones() -> None:
    """The table showed the last run of three instead of the median."""
    records = [
        record("a", 1, 1.0, record="run"),
        record("a", 1, 2.0, record="figure"),
        record("a", 1, 3.0, record="figure"),
        record("a", 1, 9.0, record="run"),
    ]
    assert "| a | 3.0 / 1.0 / 2.0 |" in report.markdown(records)


def test_answers_of_other_lengths_stand_out() -> None:
    """A figure that is not comparable looked like all others."""
    assert "other lengths" in report.markdown([record("a", 1, 1.0, out_ok=False)])


def test_engines_that_lack_a_workload_leave_a_gap() -> None:
    """Rows slid one column to the left."""
    text = report.markdown([record("a", 1, 1.0), record("a", 8, 2.0), record("b", 8, 3.0)])
    assert "| b | – | 3.0 / 1.0 / 2.0 |" in text


def test_ratios_are_written_out() -> None:
    """The claim is the ratio, not the number."""
    ours = record("a", 8, 2.0, best_peer="vllm-bf16", to_best_peer=1.2, triton_tax=1.03, of_ceiling=0.5)
    text = report.markdown([ours])
    assert "1.2 × the best peer (vllm-bf16), Triton tax 1.03" in text and "(50%)" in text


def test_a_plot_is_drawn_for_every_workload(tmp_path: Path) -> None:
    """Panels without a partner in the last row were drawn empty."""
    records = [record("pageflight", c, c * 1.0, ceiling_tok_s=c * 2.0) for c in (1, 2, 4, 8, 16, 32)]
    report.plot(records, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
