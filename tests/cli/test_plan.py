"""`pageflight plan` as it is typed: what it prints, its exit status, its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pageflight.cli import plan as plan_module
from pageflight.cli.main import main
from pageflight.kv.capacity import FreeMemory

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """Llama-3.1-8B's shape: config.json and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    assert main(["plan", *arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_a_config_alone_gives_table_and_sentences(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """16 GB of weights had to be fetched before anybody could ask where they fit."""
    assert main(["plan", checkpoint, "--gpus", "H100-94", "--context", "8192", "--concurrency", "8"]) == 0
    shown = capsys.readouterr().out
    assert "131,072 bytes a token" in shown and "H100-94 holds it" in shown and "19.3 GB" in shown
    assert "decode ceiling, all" in shown
    assert main(["plan", checkpoint, "--context", "8192"]) == 0
    shown = capsys.readouterr().out
    assert "RTX-PRO-6000-96" in shown and "One card is enough of: A10-24" in shown and "…" not in shown


def test_every_option_reaches_the_plan(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An option that is only parsed gives the same plan as without it."""
    given = {
        "--dtype": "int8", "--group-size": "128", "--kv-dtype": "u8", "--context": "1000", "--concurrency": "3",
        "--max-num-seqs": "7", "--max-num-tokens": "99", "--gpu-memory-utilization": "0.5",
    }  # fmt: skip
    plain = planned(capsys, checkpoint, "--gpus", "H100-80")
    changed = planned(capsys, checkpoint, "--gpus", "2xL40S", *(word for pair in given.items() for word in pair))
    for option, value in given.items():
        name = option.strip("-").replace("-", "_")
        assert str(changed["demand"][name]) == value and str(plain["demand"][name]) != value
    assert changed["given"]["card"]["name"] == "L40S-48" and changed["given"]["layout"]["tensor_parallel"] == 2
    assert plain["demand"]["context"] == 131072 and plain["demand"]["kv_dtype"] == "bf16"


def test_named_cards_that_do_not_hold_it_end_with_status_1(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A script went on to rent the card."""
    assert main(["plan", checkpoint, "--gpus", "A100-40/1g.10gb", "--context", "8192"]) == 1
    shown = capsys.readouterr()
    assert "error: A100-40/1g.10gb does not hold it: it misses" in shown.err and "Traceback" not in shown.err
    assert "In int4" in shown.out
    data = planned(capsys, checkpoint, "--gpus", "A100-40/1g.10gb", "--context", "8192", status=1)
    assert data["holds"] is False and data["given"]["head_room_bytes"] < 0


def test_this_machine_is_planned_with_what_is_free(
    checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's limit was overlooked, and the plan was for the host."""
    free = FreeMemory(num_bytes=40 << 30, source="limit of the container")
    monkeypatch.setattr(plan_module, "free_memory", lambda: free)
    monkeypatch.setattr(plan_module, "cpu_flags", lambda: frozenset({"avx512_bf16"}))
    fast = planned(capsys, checkpoint, "--gpus", "cpu@40GB/s", "--context", "4096", "--dtype", "int8")
    room = (40 << 30) - fast["given"]["weight_bytes"] - fast["given"]["table_bytes"]
    assert fast["given"]["kv_room_bytes"] == room // 2 and fast["demand"]["kv_dtype"] == "bf16"
    assert fast["given"]["ceilings"]["decode_alone_tokens_s"] > 0
    assert any("limit of the container" in line for line in fast["sentences"])
    monkeypatch.setattr(plan_module, "cpu_flags", lambda: frozenset())
    plain = planned(capsys, checkpoint, "--gpus", "cpu", "--context", "4096", "--max-num-seqs", "8")
    assert (plain["demand"]["dtype"], plain["demand"]["kv_dtype"]) == ("fp32", "fp32")
    assert plain["given"]["ceilings"]["decode_alone_tokens_s"] is None
    assert any("add it, as in cpu@40GB/s" in line for line in plain["sentences"])


def test_weights_that_are_there_are_weighed(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    (Path(checkpoint) / "model-00001-of-00001.safetensors").write_bytes(bytes(12345))
    assert planned(capsys, checkpoint)["model"]["checkpoint_bytes"] == 12345


def test_a_size_alone_is_enough_for_the_rule(capsys: pytest.CaptureFixture[str]) -> None:
    """70 billion parameters of 16 bits: the published 168 GB."""
    assert main(["plan", "--parameters", "70e9", "--dtype", "bf16"]) == 0
    shown = capsys.readouterr().out
    assert "168.0 GB" in shown and "no figure for K/V" in shown and "2 × H100-94" in shown
    assert main(["plan", "--parameters", "70e9", "--gpus", "H100-94"]) == 1
    assert "H100-94 does not hold it by the rule" in capsys.readouterr().err
    assert planned(capsys, "--parameters", "70e9", "--dtype", "int4")["published_rule_bytes"] == 42_000_000_000


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give either a checkpoint"),
        (["{checkpoint}", "--parameters", "7e9"], "give either a checkpoint"),
        (["./no/such/folder"], "does not exist"),
        (["{checkpoint}", "--gpus", "V100"], "gpus='V100': known are"),
        (["{checkpoint}", "--context", "200000"], "the model was made for 131072 positions"),
        (["{checkpoint}", "--kv-dtype", "fp4"], "kv_dtype='fp4': supported are"),
        (["{checkpoint}", "--dtype", "fp4"], "dtype='fp4': supported are"),
        (["{checkpoint}", "--dtype", "int8", "--group-size", "100"], "group_size=100:"),
        (["{checkpoint}", "--dtype", "int4", "--group-size", "100000"], "group_size=100000:"),
        (["{checkpoint}", "--group-size", "64"], "group_size=64: only dtypes int8 and int4"),
        (["--parameters", "70e9", "--gpu-memory-utilization", "2"], "gpu_memory_utilization=2.0"),
    ],
)
def test_an_error_is_one_line_that_says_what_to_do(
    arguments: list[str], says: str, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tracebacks frighten people and hide the one line that would have helped."""
    assert main(["plan", *(word.format(checkpoint=checkpoint) for word in arguments)]) == 1
    shown = capsys.readouterr().err
    assert says in shown and "Traceback" not in shown and shown.count("\n") == 1


def test_a_hub_id_is_asked_for_its_config_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planning a 70B fetched 140 GB first."""
    import huggingface_hub

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    asked = []

    def fetch(name: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool = False) -> str:
        asked.append((name, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert planned(capsys, "owner/name@v2")["model"]["num_layers"] == 32
    assert asked == [("owner/name", "v2", ["config.json"])]
