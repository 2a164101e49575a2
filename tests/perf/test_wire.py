import json
import struct
from pathlib import Path

import pytest
from fake_triton import FakeTriton, Served
from perf.wire import Model, WireError
from perf.workload import Workload
from typer.testing import CliRunner

from perf import load


def run(served: Served, item: str, *, tokenizer: str = "") -> dict[str, object]:
    model = load.find_model(served.address, "engine", tokenizer=tokenizer, timeout_s=10)
    return load.run(served.address, model, Workload.parse(item), vocab_size=300, seed=1, tokenizer=tokenizer)


def command(served: Served, folder: Path, *options: str) -> object:
    import typer

    app = typer.Typer()
    app.command()(load.main)
    arguments = ["--model", "engine", "--vocab-size", "300", "--address", served.address, "--wait-s", "10"]
    return CliRunner().invoke(app, [*arguments, "--out", str(folder / "r.jsonl"), "--plan", "uniq:2:4:8:6", *options])


def test_the_closed_loop_keeps_as_many_requests_open_as_asked_for() -> None:
    """A client that waited for all answers of a round before the next measured a half-empty batch."""
    with Served(FakeTriton()) as served:
        record = run(served, "uniq:3:20:16:8")
    assert served.fake.max_open == 3
    assert [seen["id"] for seen in served.fake.seen] == [str(number) for number in range(20)]
    assert record["out_ok"] and record["in_ok"]
    assert record["responses"] == 20 * 8


def test_times_of_one_request_are_in_order() -> None:
    """First token, then gaps, then the end: a mix-up of ids shows as a negative time."""
    with Served(FakeTriton()) as served:
        record = run(served, "uniq:4:8:16:8")
    assert 0 < record["ttft_p50_ms"] <= record["ttft_p99_ms"] <= record["wall_s"] * 1e3 + 10
    assert record["ttft_p50_ms"] < record["e2e_p50_ms"]
    assert 0 < record["tpot_p50_ms"] < record["e2e_p50_ms"]


@pytest.mark.parametrize("empty_final", [False, True])
def test_the_final_mark_counts_with_and_without_content(empty_final: bool) -> None:
    """Triton sends the final flag with the last token or alone, as the model pleases."""
    with Served(FakeTriton(empty_final=empty_final)) as served:
        record = run(served, "uniq:2:4:8:5")
    assert record["out_ok"] and record["responses"] == 20


def test_token_ids_travel_in_the_shapes_of_the_metadata() -> None:
    """A model with a batch dimension refuses [n], one without refuses [1, n]."""
    with Served(FakeTriton()) as served:
        run(served, "uniq:1:1:8:2")
    [seen] = served.fake.seen
    assert seen["shapes"]["input_ids"] == [1, 8] and seen["shapes"]["request_output_len"] == [1, 1]
    assert list(struct.unpack("<8i", seen["raw"]["input_ids"])) == Workload.parse("uniq:1:1:8:2").prompts(300, 1)[0]
    assert seen["raw"]["ignore_eos"] == b"\x01"


def test_a_text_model_gets_text(tmp_path: Path) -> None:
    """BYTES tensors carry their length; without it the first four letters became one."""
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with Served(FakeTriton(takes_text=True)) as served:
        with pytest.raises(WireError, match="--tokenizer"):
            run(served, "uniq:1:1:8:2")
        run(served, "uniq:1:1:8:2", tokenizer=str(tmp_path / "tokenizer.json"))
    [seen] = served.fake.seen
    assert seen["shapes"]["text_input"] == [1]
    length = struct.unpack("<I", seen["raw"]["text_input"][:4])[0]
    assert len(seen["raw"]["text_input"]) == 4 + length
    assert seen["raw"]["text_input"][4:].startswith(b"w")


def test_answers_of_another_length_are_marked_and_fail_the_command(tmp_path: Path) -> None:
    """A published 28,000 tokens/s became 7,000 when end-of-sequence was not ignored."""
    with Served(FakeTriton(missing_tokens=1)) as served:
        result = command(served, tmp_path)
    assert result.exit_code == 1
    assert json.loads((tmp_path / "r.jsonl").read_text())["out_ok"] is False


def test_the_command_appends_one_line_for_every_item_and_repetition(tmp_path: Path) -> None:
    """Figures end in JSON lines that a report can read."""
    with Served(FakeTriton()) as served:
        result = command(served, tmp_path, "--repeat", "2", "--label", "ours")
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [record["seed"] for record in records] == [100, 200]
    assert all(record["label"] == "ours" and record["cores"] >= 1 for record in records)


def test_a_refusal_ends_the_run_with_the_servers_words(tmp_path: Path) -> None:
    """A refused request counted as an answer of no tokens made the rest look fast."""
    with Served(FakeTriton(error="prompt has 8 tokens, limit 4")) as served:
        with pytest.raises(WireError, match="prompt has 8 tokens, limit 4"):
            run(served, "uniq:2:4:8:5")
        assert command(served, tmp_path).exit_code == 2


def test_a_missing_final_response_is_an_error_and_not_a_wait() -> None:
    """Exactly one final response is promised: without it the client would wait for ever."""
    with Served(FakeTriton(skip_finals=True)) as served, pytest.raises(WireError, match="closed the stream"):
        run(served, "uniq:1:1:8:5")


def test_an_unknown_model_is_named() -> None:
    """gRPC's own message is a page of debug text."""
    with Served(FakeTriton()) as served, pytest.raises(WireError, match=r"model engin: .*unknown model"):
        load.find_model(served.address, "engin", tokenizer="", timeout_s=10)


def test_a_model_that_lacks_a_tensor_is_refused_before_anything_is_sent() -> None:
    """A server that ignores `ignore_eos` in silence would answer with any length."""
    model = Model(name="m", inputs={"text_input": ("BYTES", (1,))}, outputs=frozenset())
    with pytest.raises(WireError, match="max_tokens"):
        model.request(0, "text", 4)
