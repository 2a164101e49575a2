"""A run through Triton, recorded and replayed."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from servers import Server

from pageflight.cli.main import main
from pageflight.loop.recorder import read_entries
from pageflight.loop.recording import Called


def test_a_run_through_triton_replays_with_the_engine_bit_for_bit(
    server: Server, repository: tuple[Path, int], recordings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The setting got lost on its way from the command through server and stub to the core."""
    wishes = [
        {"text_input": "the fox", "max_tokens": 20},
        {"text_input": "the fox", "max_tokens": 20, "num_return_sequences": 3, "temperature": 1.0, "seed": 5},
        {"text_input": "a dog jumps over", "max_tokens": 40, "repetition_penalty": 1.3, "return_log_probs": True},
    ]
    with ThreadPoolExecutor(9) as pool:
        assert all(pool.map(lambda index: server.text(**wishes[index % 3]), range(9)))
    (file,) = recordings.iterdir()
    assert file.name.startswith("run.0-")
    until_s = time.monotonic() + 30
    while sum(isinstance(entry, Called) and entry.name == "submit" for entry in read_entries(file)) < 9:
        assert time.monotonic() < until_s
    for arguments in ([], ["--engine", str(repository[0]), "--check-invariants"]):
        status = main(["replay", str(file), *arguments])
        shown = capsys.readouterr()
        assert status == 0, shown.err
        assert "steps, all the same" in shown.out
