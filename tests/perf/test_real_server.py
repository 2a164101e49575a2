import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from perf.wire import Stream
from perf.workload import Workload
from servers import Server, running_server, wait_for
from tiny_checkpoint import make_tiny_checkpoint

from pageflight_build.options import BuildOptions, EngineOptions, ServingOptions
from pageflight_build.recipe import build
from perf import load

ROOT = Path(__file__).resolve().parents[2]
PERF_ANALYZER = ROOT / "scripts" / "perf_analyzer"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """A server with a tiny model, and its tokenizer.json."""
    folder = tmp_path_factory.mktemp("perf")
    vocab_size = make_tiny_checkpoint(folder / "checkpoint")
    options = BuildOptions(
        checkpoint=folder / "checkpoint",
        repository=folder / "repository",
        name="tiny",
        engine=EngineOptions(dtype="fp32"),
        serving=ServingOptions(kv_memory=16 << 20, max_num_seqs=32),
    )
    build(options)
    with running_server(folder / "repository", "tiny", vocab_size) as server:
        yield server, str(folder / "checkpoint" / "tokenizer.json")


@pytest.fixture(scope="module")
def perf_analyzer() -> Path:
    """The installed program; the first start downloads it."""
    done = subprocess.run([PERF_ANALYZER, "--version"], capture_output=True, text=True, timeout=200, check=False)
    if done.returncode and "could not" in done.stderr:
        pytest.skip(f"perf_analyzer is not installed and cannot be downloaded: {done.stderr.strip()[-300:]}")
    assert done.returncode == 0 and "Perf Analyzer" in done.stdout + done.stderr, done.stderr
    return PERF_ANALYZER


@pytest.mark.parametrize("model", ["engine", "tiny", "ensemble"])
def test_the_client_gets_exact_lengths_from_every_streaming_model(served: tuple[Server, str], model: str) -> None:
    """Figures of answers that end early are worthless; each model has shapes of its own."""
    server, tokenizer = served
    triton = load.find_model(server.grpc, model, tokenizer=tokenizer, timeout_s=30)
    workload = Workload.parse("uniq:4:8:24:16")
    record = load.run(server.grpc, triton, workload, vocab_size=server.vocab_size, seed=1, tokenizer=tokenizer)
    assert record["out_ok"]
    assert record["in_ok"] or triton.takes_text
    assert 8 <= record["responses"] <= 8 * 16  # on a busy machine tokens are joined


def test_a_second_stream_is_as_good_as_the_first(served: tuple[Server, str]) -> None:
    """A stream that was cancelled too early left its last request open in the server."""
    server, _ = served
    triton = load.find_model(server.grpc, "engine", tokenizer="", timeout_s=30)
    requests = [triton.request(number, [5, 6, 7], 4) for number in range(3)]
    for _ in range(3):
        with Stream(server.grpc) as stream:
            assert [answer.num_output for answer in stream.drive(requests, 3)] == [4, 4, 4]
    assert wait_for(lambda: _active(server) == [0.0]), _active(server)  # metrics are published twice a second


def _active(server: Server) -> list[float]:
    return [value for name, value in server.metrics().items() if 'request_type="active"' in name]


@pytest.mark.parametrize(("model", "inputs"), [("tiny", "name.json"), ("ensemble", "ensemble.json")])
@pytest.mark.parametrize("concurrency", [1, 32])
def test_perf_analyzer_streams(
    served: tuple[Server, str], perf_analyzer: Path, model: str, inputs: str, concurrency: int
) -> None:
    """NVIDIA's own client: it refuses models whose configuration or optional tensors it does not understand."""
    server, _ = served
    command = [perf_analyzer, "-m", model, "-i", "grpc", "-u", server.grpc, "--streaming", "--async"]
    command += ["--input-data", ROOT / "perf" / "inputs" / inputs, "--concurrency-range", str(concurrency)]
    command += ["--request-count", str(2 * concurrency)]
    command += ["-b", "1"] if model == "ensemble" else []
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, env={**os.environ, "LC_ALL": "C"}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"Request count: (\d+)", done.stdout)
    assert found and int(found[1]) == 2 * concurrency, done.stdout
    responses = re.search(r"Response Throughput: ([\d.]+)", done.stdout)
    assert responses and float(responses[1]) > 0, done.stdout
