"""The checks for GPUs, on a tiny model in Triton's interpreter: what they would find there, they find here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from perf.gpu_check import __main__ as gpu_check_main
from perf.gpu_check import (
    engine_checks,
    kernel_checks,
    tensorrt_checks,
    tensorrt_flavors,
    tensorrt_segments,
    tuning_checks,
)
from perf.gpu_check.card import Card
from perf.gpu_check.engine_checks import Load
from perf.gpu_check.kernel_checks import Checks
from perf.gpu_check.models import SHAPES
from perf.gpu_check.network_walk import WalkedSegments
from perf.gpu_check.tensorrt_flavors import in_folder

from pageflight.core.request import Request, SamplingParams
from pageflight.kernels import gemm_int, tuning

ROOT = Path(__file__).resolve().parents[2]
CARD = Card(torch.device("cpu"))


def test_right_kernels_pass_and_wrong_ones_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that compares a result with itself passes on every card."""
    records = Checks(CARD, is_tiny=True).run()
    assert len(records) >= 16 and all("error" in record for record in records[2:])
    right = kernel_checks.silu_mul
    monkeypatch.setattr(kernel_checks, "silu_mul", lambda x: 1.01 * right(x))
    with pytest.raises(AssertionError, match="silu_mul: relative error"):
        Checks(CARD, is_tiny=True).run()


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_steps_and_throughput_are_measured(dtype: str) -> None:
    steps = list(engine_checks.steps(CARD, SHAPES["tiny"], dtype, (1, 2)))
    assert [record["batch"] for record in steps] == [1, 2] and all(record["ms"] > 0 for record in steps)
    load = Load(num_prompt=9, num_output=3, num_requests=3)
    (record,) = engine_checks.throughput(CARD, SHAPES["tiny"], dtype, (load,), max_num_seqs=4, max_num_tokens=16)
    assert record["requests"] == 3 and record["out_tok_s"] > 0


def test_every_tensorrt_package_gets_an_answer_and_what_serves_instead() -> None:
    """One that is not installed is no failure, and no GPU no excuse for silence: engines that nothing here can run were
    really built and refused, and their weights gave the ids of our kernels."""
    *answers, served = in_folder(tensorrt_checks.answers, CARD)
    assert [record["name"] for record in answers] == ["tensorrt rtx", "tensorrt full"]
    assert all("reason" in record for record in answers)
    assert served["runs_on"] == "kernels" and "does not take it" in str(served["reason"])


@pytest.mark.parametrize("form", ["input", "constant"])
def test_right_segments_pass_and_wrong_ones_fail(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Walked in place of engines they are as near to float64 as torch; a tenth more, and they are not."""
    cases = ("fp32", "fp8", "int8 static", "int4")
    records = list(in_folder(tensorrt_segments.segments, CARD, form, cases))
    assert len(records) == 3 * len(cases) and all(record["error"] == record["torch"] for record in records)
    assert all(0 < float(str(record["error"])) < 0.1 for record in records), "nothing was compared, or not with it"
    right = WalkedSegments.run

    def wrong(self: WalkedSegments, segment: str, profile: int, inputs: Any, outputs: Any) -> None:
        right(self, segment, profile, inputs, outputs)
        outputs[next(iter(outputs))].mul_(1.1)

    monkeypatch.setattr(WalkedSegments, "run", wrong)
    with pytest.raises(AssertionError, match=r"first: .* tokens: error"):
        list(in_folder(tensorrt_segments.segments, CARD, form, cases))


def test_layers_are_timed_and_captured_steps_compared() -> None:
    (record,) = in_folder(tensorrt_segments.layers, CARD, "input", ("int4",))
    assert float(str(record["us_1"])) > 0 and float(str(record["us_16"])) > 0
    assert [record["name"] for record in in_folder(tensorrt_checks.graphs, CARD)] == [
        "graphs rtx input",
        "graphs rtx constant",
    ]


def test_a_part_that_checks_nothing_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a card that no flavor takes the parts of TensorRT wrote nothing, printed nothing, and counted as passed."""
    monkeypatch.setattr(tensorrt_flavors, "tried", lambda flavor, card: ({"reason": f"no {flavor} here"}, None))
    for part in ("tensorrt_segments", "tensorrt_graphs", "tensorrt_layer"):
        monkeypatch.setattr(sys, "argv", ["gpu_check", part, "--device", "cpu", "--out", str(tmp_path)])
        gpu_check_main.main()
        assert "nothing was checked" in capsys.readouterr().out
        (path,) = tmp_path.glob(f"gpu_{part}_2*.json")
        (record,) = json.loads(path.read_text())["records"]
        assert record["skipped"] == "rtx: no rtx here; full: no full here"


def test_rows_rise_again_after_smaller_steps_were_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows fell only: a graph was never replayed after its context had run another size."""
    submitted: list[Request] = []
    rows: list[int] = []
    scheduler = SimpleNamespace(submit=lambda request, now_s: submitted.append(request))

    def drive(*_: object) -> SimpleNamespace:
        rows.append(len(submitted) - sum(rows))
        return SimpleNamespace(ids={request.handle: [2] for request in submitted})

    monkeypatch.setattr(tensorrt_checks, "make_scheduler", lambda runner, max_num_tokens: scheduler)
    monkeypatch.setattr(tensorrt_checks, "drive", drive)
    served: Any = tensorrt_checks._served
    found = served(None, tensorrt_checks.WAVES)
    fall = rows.index(2)
    assert 4 in rows[:fall] and 4 in rows[fall:] and len(found) == sum(rows) == len(submitted)
    assert max(len(request.prompt_ids) + request.sampling.max_tokens for request in submitted) < 96


def test_a_card_is_idle_where_nothing_runs() -> None:
    """Kernels side by side were counted twice, and a card that waited half of the time was busy."""
    assert engine_checks.idle_share([(0.0, 4.0), (1.0, 2.0), (3.0, 5.0), (8.0, 10.0)]) == pytest.approx(0.3)
    assert engine_checks.idle_share([(7.0, 9.0)]) == 0.0


def test_a_run_can_stop_and_go_on() -> None:
    """What is traced is the middle of a load: the steps before it and in it are counted, and none is left in flight."""
    sizes = {"max_num_seqs": 2, "max_num_tokens": 16, "max_model_len": 24}
    runner = engine_checks.make_runner(CARD, SHAPES["tiny"], "bf16", **sizes)
    scheduler = engine_checks.make_scheduler(runner, max_num_tokens=8)
    scheduler.submit(Request(handle=0, prompt_ids=(2, 3, 4), sampling=SamplingParams(max_tokens=5)), 0.0)
    first = engine_checks.drive(scheduler, runner, num_steps=2)
    second = engine_checks.drive(scheduler, runner)
    assert first.num_steps == 2 and len(first.ids[0]) + len(second.ids[0]) == 5


def test_measured_choices_are_written_where_kernels_look_them_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is measured under a key of its own is never read. What is left when time is over is told, and done next."""
    makers = list(tuning_checks.problems(CARD, SHAPES["tiny"]))
    assert len({key.split("/")[0] for key, _ in makers}) == 6, "attention of both kinds, products of three, experts"
    assert all(make().key == key for key, make in makers)
    assert list(tuning_checks.tune(CARD, SHAPES["tiny"], None, limit_s=0.0))[-1]["left"] == len(makers)
    few = gemm_int.candidates(16)[:2]
    monkeypatch.setattr(gemm_int, "candidates", lambda num_tokens: few)
    monkeypatch.setattr(tuning_checks, "problems", lambda card, config: makers[3:5])
    *records, last = tuning_checks.tune(CARD, SHAPES["tiny"], tmp_path)
    assert [record["name"] for record in records] == [key for key, _ in makers[3:5]] and last["left"] == 0
    assert set(tuning.read(tmp_path / "interpreted.json")) == {key for key, _ in makers[3:5]}
    assert not (tuning.FOLDER / "interpreted.json").exists(), "times of an interpreter are not for kernels"


def test_a_machine_without_a_gpu_is_told_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "perf.gpu_check", "graphs"]
    if not torch.cuda.is_available():
        refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert refused.returncode != 0 and "no GPU here" in refused.stderr
    found = subprocess.run(
        [*command, "--device", "cpu", "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    (path,) = tmp_path.glob("gpu_graphs_*.json")
    assert json.loads(path.read_text())["records"][0]["name"] == "graphs"
