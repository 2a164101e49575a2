"""The checks for GPUs, on a tiny model in Triton's interpreter: what they would find there, they find here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from perf.gpu_check import __main__ as gpu_check_main
from perf.gpu_check import (
    attention_checks,
    engine_checks,
    kernel_checks,
    parallel_checks,
    sampling_checks,
    state_checks,
    tensorrt_checks,
    tensorrt_flavors,
    tensorrt_ranks,
    tensorrt_segments,
    tuning_checks,
)
from perf.gpu_check.card import Card, Record, attempted
from perf.gpu_check.engine_checks import Load
from perf.gpu_check.kernel_checks import Checks
from perf.gpu_check.models import SHAPES
from perf.gpu_check.network_walk import WalkedSegments
from perf.gpu_check.tensorrt_flavors import in_folder

from pageflight.core.config import EngineConfig
from pageflight.core.errors import ConfigError
from pageflight.core.request import Request, SamplingParams
from pageflight.kernels import gemm_int, tuning
from pageflight.lowering.communicator import Communicator
from pageflight.lowering.tensorrt_target import TensorRtTarget

ROOT = Path(__file__).resolve().parents[2]
CARD = Card(torch.device("cpu"))


def test_right_kernels_pass_and_wrong_ones_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that compares a result with itself passes on every card."""
    records = list(Checks(CARD, is_tiny=True).run())
    assert not [record for record in records if "failed" in record]
    names = {str(record["name"]) for record in records[2:]}
    assert all("error" in record for record in records[2:])
    for kind in ("norm", "silu", "quantise", "decode", "mixed", "rope", "copies", "rows", "inputs", "ids", "sample"):
        assert any(kind in name for name in names), f"no kernel of {kind} was checked"
    splits = [record["splits"] for record in records if "splits" in str(record["name"])]
    assert len(splits) == 4 and all(int(str(count)) > 1 for count in splits), "nothing was joined"
    right = kernel_checks.silu_mul

    def refused(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(kernel_checks, "silu_mul", lambda x: 1.01 * right(x))
    monkeypatch.setattr(kernel_checks, "gemm_int8", refused)
    few = [each for each in Checks(CARD, is_tiny=True).checks() if each[0].startswith(("silu", "gemm_int", "rms"))]
    monkeypatch.setattr(Checks, "checks", lambda self: few)
    found = list(Checks(CARD, is_tiny=True).run())
    wrong = {record["name"]: str(record["failed"]) for record in found if "failed" in record}
    assert len(found) > len(wrong), "what follows a failure is not checked"
    assert set(wrong) == {"silu_mul", "gemm_int8 T=1", "gemm_int8 T=8", "gemm_int8 T=32"}
    assert wrong["silu_mul"].startswith("relative error out 1") and "no such kernel" in wrong["gemm_int8 T=8"]


@pytest.mark.parametrize(
    ("module", "kernel", "name"),
    [
        (attention_checks, "decode_attention", "decode_attention float32"),
        (attention_checks, "mixed_attention", "mixed_attention float32 chunks"),
        (attention_checks, "rope_and_write", "rope_and_write float32"),
        (state_checks, "copy_blocks", "copies of blocks float8_e4m3fn"),
        (state_checks, "fill", "changes of rows"),
        (state_checks, "prepare", "inputs of a decode step"),
        (state_checks, "append", "ids put back"),
    ],
)
def test_a_kernel_that_writes_nothing_is_wrong(
    module: ModuleType, kernel: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs are not made from what they are compared with."""
    monkeypatch.setattr(module, kernel, lambda *arguments, **options: None)
    record = attempted(name, dict(Checks(CARD, is_tiny=True).checks())[name])
    assert str(record["failed"]).startswith("relative error")


def test_other_ids_than_the_host_s_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy rows must agree, whatever exponentials do."""
    right = sampling_checks.sample

    def sample(*arguments: Any, **options: Any) -> Any:
        return right(*arguments, **options, adjusts=False)

    monkeypatch.setattr(sampling_checks, "sample", sample)
    record = sampling_checks.sampled(Checks(CARD, is_tiny=True).bench)
    assert int(str(record["differing"])) > 1 and "greedy" in str(record["failed"])


def test_a_wrong_result_is_kept_with_all_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first wrong result, or the end of the time, took with it all that had been found before."""
    found: list[int] = []

    def part(self: Any) -> Iterator[Record]:
        yield {"name": "first", "failed": "too large"}
        found.append(len(written(tmp_path)))
        yield {"name": "second"}
        raise RuntimeError("the card is gone")

    monkeypatch.setattr(gpu_check_main.Parts, "kernels", part)
    with pytest.raises(SystemExit, match=r"2 of 3 failed: first, kernels"):
        gpu_check_main.main(["kernels", "--device", "cpu", "--out", str(tmp_path)])
    assert found == [1], "the file is written while the part runs"
    assert written(tmp_path)[1:] == [
        {"name": "second"},
        {"name": "kernels", "failed": "RuntimeError: the card is gone"},
    ]
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_what_could_not_be_checked_is_not_taken_for_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no package took the card, a part ended in silence as one does whose results are all right."""
    for records in ([], [{"name": "tensorrt", "skipped": "no flavor takes the card"}]):
        monkeypatch.setattr(gpu_check_main.Parts, "tensorrt", lambda self, records=records: records)
        gpu_check_main.main(["tensorrt", "--device", "cpu"])
        assert "tensorrt: nothing was checked" in capsys.readouterr().out


def written(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("gpu_*.json")
    records: list[dict[str, Any]] = json.loads(path.read_text())["records"]
    return records


def test_steps_are_measured() -> None:
    steps = list(engine_checks.steps(CARD, SHAPES["tiny"], "fp8", (1, 2)))
    assert [record["batch"] for record in steps] == [1, 2] and all(record["ms"] > 0 for record in steps)


def test_throughput_is_measured_and_a_load_that_fails_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that end early are a better throughput, and wrong."""
    right, lengths = engine_checks.drive, iter((0, 1))

    def drive(*arguments: Any, **options: Any) -> engine_checks.Driven:
        if not next(lengths):
            raise RuntimeError("out of blocks")
        return right(*arguments, **options)

    monkeypatch.setattr(engine_checks, "drive", drive)
    load = Load(num_prompt=9, num_output=2, num_requests=2)
    sizes = {"max_num_seqs": 2, "max_num_tokens": 16}
    first, second = engine_checks.throughput(CARD, SHAPES["tiny"], "bf16", (load, load), **sizes)
    assert first["failed"] == "RuntimeError: out of blocks" and first["requests"] == 2
    assert "failed" not in second and second["requests"] == 2 and second["out_tok_s"] > 0


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


def test_ranks_that_are_processes_give_the_ids_of_one_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner of GPUs, a process for each stage and gloo between them; then TensorRT's networks of two ranks, of
    which nothing asked a card."""
    monkeypatch.setattr(tensorrt_ranks, "COLLECTIVES", ("inside",))
    one, two, three = parallel_checks.parallel(CARD, tmp_path, [(1, 2)])
    assert "failed" not in two and two["tokens"] == one["tokens"] and float(str(two["there_and_back_us_1"])) > 0
    assert three["name"] == "tensor parallel 2 of TensorRT rtx, sums inside engines"
    assert "failed" not in three and three["tokens"] == one["tokens"] and float(str(three["sum_us_1"])) > 0


def _named(name: str, folder: Path) -> Record:
    return {"name": name}


def test_what_a_tensorrt_of_ranks_lacks_is_skipped_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bindings without sums inside, and machines without TensorRT, are no failures, and nobody's silence either."""

    def lacks(trt: ModuleType, target: TensorRtTarget) -> None:
        if target.collectives == "inside":
            raise ConfigError("it has no add_dist_collective")

    asked = []
    monkeypatch.setattr(tensorrt_ranks, "check_collectives", lacks)
    monkeypatch.setattr(tensorrt_ranks, "write_engine", lambda folder, *arguments: asked.append(folder.name))
    between, inside = tensorrt_ranks.ranks_of_tensorrt(CARD, tmp_path, SHAPES["tiny"], 64, _named)
    assert asked == ["rtx-between"] and "skipped" not in between
    assert inside["skipped"] == "it has no add_dist_collective"
    monkeypatch.setattr(tensorrt_ranks, "usable", lambda card: iter(()))
    (none,) = tensorrt_ranks.ranks_of_tensorrt(CARD, tmp_path, SHAPES["tiny"], 64, _named)
    assert str(none["skipped"]).startswith("rtx: no GPU; full: ")


def test_ranks_that_tensorrt_refuses_are_not_served_by_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels took over, as they do for a server, and gave the right ids in TensorRT's name."""

    def refused(*arguments: Any, **options: Any) -> None:
        raise ConfigError("it does not take the card")

    monkeypatch.setattr(tensorrt_ranks, "load_segments", refused)
    engine: Any = None
    with pytest.raises(RuntimeError, match="does not take the card"):
        tensorrt_ranks.load_rank(engine, tmp_path, torch.device("cuda"), communicator=cast(Communicator, None))


@pytest.mark.parametrize(
    ("ids", "last", "complaint"),
    [([5, 6], -2.0, None), ([5, 7], -2.0, "other ids than on one card"), ([5, 6], -2.1, "other log probabilities")],
)
def test_cards_that_say_other_than_one_have_failed(
    ids: list[int], last: float, complaint: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What two cards said was compared with itself."""
    ranks = SimpleNamespace(measured=lambda *arguments: {"sum_us_1": 7.0}, close=lambda: None)
    together = engine_checks.Driven({0: ids}, {0: [-1.0, last]})
    monkeypatch.setattr(parallel_checks, "Ranks", lambda *arguments: ranks)
    monkeypatch.setattr(parallel_checks, "_served", lambda *arguments: together)
    alone = engine_checks.Driven({0: [5, 6]}, {0: [-1.0, -2.0]})
    record = parallel_checks._compared("two", CARD, tmp_path, EngineConfig(), alone, 2, 1)
    assert record.get("failed") == complaint and record["sum_us_1"] == 7.0


def test_a_card_alone_is_not_taken_for_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = list(parallel_checks.parallel(Card(torch.device("cuda")), tmp_path))
    assert found == [{"name": "parallel", "skipped": "1 card"}]


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


def test_a_problem_that_no_candidate_solves_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stopped there stopped there at every later run, and what comes after it was never measured."""

    def refused(tiles: Any) -> None:
        raise RuntimeError("PassManager::run failed")

    keys = ("one", "other", "third")
    made = (
        tuning.Problem(key="one", candidates=(None,), launch=refused),
        tuning.Problem(key="misnamed", candidates=(None,), launch=lambda tiles: None),
        tuning.Problem(key="third", candidates=(None,), launch=lambda tiles: None),
    )
    makers = [(key, lambda problem=problem: problem) for key, problem in zip(keys, made, strict=True)]
    monkeypatch.setattr(tuning_checks, "problems", lambda card, config: makers)
    first, second, third, last = tuning_checks.tune(CARD, SHAPES["tiny"], None)
    assert "none of 1 candidates" in str(first["failed"]) and "misnamed" in str(second["failed"])
    assert "failed" not in third and (last["measured"], last["left"]) == (1, 2)


def test_a_machine_without_a_gpu_is_told_so(tmp_path: Path) -> None:
    """And parts run where their kernels can be interpreted."""
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no GPU here"):
            gpu_check_main.main(["graphs"])
    command = [sys.executable, "-m", "perf.gpu_check", "graphs", "--device", "cpu", "--out", str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert [record["name"] for record in written(tmp_path)] == ["graphs kv torch.float32", "graphs kv fp8"]
