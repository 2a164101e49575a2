import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from perf.sides import ALL_KINDS, Child, GenaiSide, SideError
from perf.workload import Kind, Workload

from perf import compare_peers, figures


@dataclass
class FixedSide:
    """Answers with given tokens/s."""

    label: str
    tok_s: list[float]
    weights: str = "bf16"
    is_ours: bool = False
    is_served: bool = True
    kinds: frozenset[Kind] = ALL_KINDS
    calls: list[tuple[str, int]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def measure(self, workload: Workload, seed: int) -> figures.Record:
        self.calls.append((str(workload), seed))
        self.log.append(self.label)
        return {"tok_s": self.tok_s[len(self.calls) - 1], "out_ok": True, "in_ok": True}


def test_sides_alternate_and_another_one_begins_each_turn(tmp_path: Path) -> None:
    """All runs of one side after all of the other measure the neighbours' day, not the engines."""
    log: list[str] = []
    sides = [FixedSide("a", [1, 2, 3], log=log), FixedSide("b", [4, 5, 6], log=log)]
    plan = [Workload.parse("uniq:1:1:8:4")]
    runs = compare_peers.run_all(sides, plan, repeat=3, seed=7, out=tmp_path / "r.jsonl", model="m")
    assert log == ["a", "b", "b", "a", "a", "b"]
    assert sides[0].calls == sides[1].calls, "both sides must be asked the same"
    assert len({seed for _, seed in sides[0].calls}) == 3
    assert [run["tok_s"] for run in runs["uniq:1:1:8:4", "b"]] == [4, 5, 6]
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 6


def test_a_side_is_asked_only_what_it_is_there_for(tmp_path: Path) -> None:
    """GenAI runs twice, with its prefix cache and without; each figure must come from the better setting."""
    only_shared = FixedSide("s", [1.0], kinds=frozenset({Kind.shared}))
    plan = [Workload.parse("uniq:1:1:8:4"), Workload.parse("shared:1:1:8+2:4")]
    compare_peers.run_all([only_shared], plan, repeat=1, seed=0, out=tmp_path / "r.jsonl", model="m")
    assert [item for item, _ in only_shared.calls] == ["shared:1:1:8+2:4"]


def test_the_median_run_is_reported_with_all_the_others() -> None:
    """The best of three flatters whoever varies most."""
    runs = [{"tok_s": 3.0, "out_ok": True}, {"tok_s": 9.0, "out_ok": True}, {"tok_s": 5.0, "out_ok": False}]
    record = compare_peers.median_record(runs)
    assert record["tok_s"] == 5.0 and record["runs_tok_s"] == [3.0, 9.0, 5.0]
    assert record["lengths_ok"] is False


def test_ratios_are_to_peers_of_the_same_precision() -> None:
    """bf16 must not be compared with a peer's int8; in-process peers are no served ones."""
    ours = FixedSide("pageflight-bf16", [], is_ours=True)
    alone = FixedSide("engine-bf16", [], is_ours=True, is_served=False)
    served = FixedSide("vllm-bf16", [])
    in_process = FixedSide("genai-bf16", [], is_served=False)
    other = FixedSide("vllm-w8a8", [], weights="int8")
    medians = [(ours, 100.0), (alone, 105.0), (served, 80.0), (in_process, 125.0), (other, 500.0)]
    records = compare_peers.with_ratios([(side, {"tok_s": tok_s}) for side, tok_s in medians])
    assert records[0] == {
        "tok_s": 100.0,
        "best_peer": "genai-bf16",
        "to_best_peer": 0.8,
        "to_best_served_peer": 1.25,
        "triton_tax": 1.05,
    }
    assert records[1]["to_best_peer"] == 0.84 and "triton_tax" not in records[1]
    assert records[2] == {"tok_s": 80.0}


def test_every_named_side_can_be_made_and_others_are_refused(tmp_path: Path) -> None:
    """A typing error in --sides left a column out of the table in silence."""
    (tmp_path / "models" / "m").mkdir(parents=True)
    (tmp_path / "models" / "m" / "config.json").write_text(json.dumps({"vocab_size": 300}))
    sides = compare_peers.make_sides(
        compare_peers.SIDES, peers_dir=tmp_path, model="m", work_dir=tmp_path / "w", kv_gib=1
    )
    assert [side.label for side in sides if not side.label.endswith("-prefix")] == list(compare_peers.SIDES)
    assert [side.kinds for side in sides if isinstance(side, GenaiSide)].count(frozenset({Kind.uniq})) == 2
    with pytest.raises(ValueError, match="vllm-fp16"):
        compare_peers.make_sides(["vllm-fp16"], peers_dir=tmp_path, model="m", work_dir=tmp_path, kv_gib=1)


def test_a_driver_that_dies_is_reported_with_its_log(tmp_path: Path) -> None:
    """The comparison waited for a line that nobody would write."""
    child = Child([sys.executable, "-c", "print('no json'); raise SystemExit(3)"], tmp_path / "x.log", piped=True)
    with pytest.raises(SideError, match=r"status 3; log: .*x\.log"):
        child.read_record()
    child.stop()
    assert child.process.stdout is not None and child.process.stdin is not None
    child.process.stdout.close()
    child.process.stdin.close()
