"""The end of a server: what is open finishes, what comes is refused."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
import tritonclient.grpc as triton
from commands import serving
from grpc_stream import Stream, stream, tensor, text_tensor
from servers import Server, running_server, wait_for
from tritonclient.utils import InferenceServerException

from pageflight.loop.address import drain_marker, instance_address
from pageflight.loop.status import read_status
from pageflight_build.triton_config import Deployment, write_repository

NAME = "tiny"
EXIT_TIMEOUT_S = 12
NUM_TOKENS, SHORT = 150, 80  # of 20 ms each
PROMPTS = [f"the fox number {number} runs" for number in range(6)]


@pytest.fixture(scope="module")
def slow_repository(repository: tuple[Path, int], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """An engine without a model, 20 ms a step."""
    return without_model(repository, tmp_path_factory.mktemp("drain"), step_s=0.02)


@pytest.fixture(scope="module")
def very_slow_repository(repository: tuple[Path, int], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A fifth of a second a step: no client is so late that a stream is over when it hears of its first token."""
    return without_model(repository, tmp_path_factory.mktemp("slow"), step_s=0.2)


def without_model(repository: tuple[Path, int], folder: Path, *, step_s: float) -> tuple[Path, int]:
    """The repository with an engine whose steps take so long and compute nothing."""
    built, vocab_size = repository
    fake = f'{{"kind":"checking","vocab_size":{vocab_size},"step_s":{step_s}}}'
    write_repository(folder / "repository", Deployment(name=NAME, max_num_seqs=16, fake_engine=fake))
    artifacts = folder / "repository" / "engine" / "1" / "artifacts"
    artifacts.symlink_to(built / "engine" / "1" / "artifacts", target_is_directory=True)
    return folder / "repository", vocab_size


def options(max_tokens: int, *, batched: bool = False) -> list[triton.InferInput]:
    flags = [tensor(name, [True], "BOOL", batched=batched) for name in ("stream", "ignore_eos")]
    return [tensor("max_tokens", [max_tokens], "INT32", batched=batched), *flags]


def ask(
    server: Server, prompt: str, model: str, max_tokens: int = NUM_TOKENS, begun: threading.Event | None = None
) -> Stream:
    batched = model == "ensemble"
    inputs = [text_tensor(prompt, batched=batched), *options(max_tokens, batched=batched)]
    return stream(server.grpc, model, inputs, begun)


@contextmanager
def streaming(server: Server, models: Sequence[str], max_tokens: int) -> Iterator[list[Future[Stream]]]:
    """Streams of all prompts, taking turns in `models`, once every client has got something."""
    begun = [threading.Event() for _ in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        asked = [
            pool.submit(ask, server, prompt, models[index % len(models)], max_tokens, begun[index])
            for index, prompt in enumerate(PROMPTS)
        ]
        assert all(event.wait(10) for event in begun)
        yield asked


def test_a_stream_that_has_just_begun_is_not_killed(
    slow_repository: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """How much was open was read from /metrics, half a second late and nothing at all where metrics are off: SIGTERM
    came at once, and ten seconds later SIGKILL in the middle of a word."""
    monkeypatch.setattr("pageflight.cli.server_process._UNLOAD_S", 0.5)
    further = ("--allow-metrics=false",)
    with running_server(slow_repository[0], NAME, slow_repository[1], further, exit_timeout_s=60) as server:
        expected = ask(server, PROMPTS[0], NAME, SHORT).joined()
        with streaming(server, (NAME, "ensemble"), SHORT) as asked:
            told: list[str] = []
            status = server.process.drain(60, told.append)
            streams = [future.result() for future in asked]
        assert [each.errors for each in streams] == [[]] * len(PROMPTS)
        assert [each.num_final for each in streams] == [1] * len(PROMPTS)
        assert streams[0].joined() == expected
        assert (status, server.process.num_cut_off, len(told)) == (0, 0, 1)


def test_streams_open_at_sigterm_finish_and_are_right(slow_repository: tuple[Path, int]) -> None:
    """Triton unloads a model while it has streams open; what `finalize` does not wait for is cut in mid-word, and its
    client hears nothing at all."""
    with running_server(slow_repository[0], NAME, slow_repository[1], exit_timeout_s=EXIT_TIMEOUT_S) as server:
        expected = ask(server, PROMPTS[0], NAME).joined()
        with streaming(server, (NAME, "ensemble"), NUM_TOKENS) as asked:
            os.kill(server.process.pid, signal.SIGTERM)
            streams = [future.result() for future in asked]
        assert [each.errors for each in streams] == [[]] * len(PROMPTS)
        assert streams[0].joined() == expected
        assert server.process.wait() == 0


def test_streams_that_outlast_the_exit_timeout_are_told_so(slow_repository: tuple[Path, int]) -> None:
    """Triton aborted with the streams open, and their clients waited for ever."""
    with running_server(slow_repository[0], NAME, slow_repository[1], exit_timeout_s=EXIT_TIMEOUT_S // 2) as server:
        with streaming(server, (NAME,), 480) as asked:
            os.kill(server.process.pid, signal.SIGTERM)
            streams = [future.result() for future in asked]
        said = [str(error) for each in streams for error in each.errors]
        assert len(said) == len(PROMPTS)
        assert all("the server ended before this request did" in text for text in said), said
        server.process.wait()  # not its status: a busy machine may need more than the three seconds that are left


def test_a_draining_server_refuses_new_requests_and_finishes_the_open_ones(slow_repository: tuple[Path, int]) -> None:
    """At SIGTERM Triton forgets its models: new requests heard that there had never been any (NOT_FOUND), which no
    balancer takes for a reason to ask another server."""
    with (
        running_server(slow_repository[0], NAME, slow_repository[1], exit_timeout_s=EXIT_TIMEOUT_S) as server,
        streaming(server, (NAME, "ensemble"), NUM_TOKENS) as asked,
        ThreadPoolExecutor(1) as pool,
    ):
        drained = pool.submit(server.process.drain, EXIT_TIMEOUT_S, lambda text: None)
        assert wait_for(drain_marker(server.process.pid).exists)
        client = triton.InferenceServerClient(server.grpc)
        with pytest.raises(InferenceServerException, match="shutting down") as refused:
            client.infer(f"{NAME}_unary", [text_tensor("too late")])
        assert "UNAVAILABLE" in str(refused.value.status())
        body = {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["too late"]}]}
        assert requests.post(server.url(f"{NAME}_unary", "infer"), json=body, timeout=30).status_code == 503
        for model in (NAME, "ensemble"):
            answer = server.generate(model, text_input="too late", max_tokens=3)
            assert answer.status_code == 400  # Triton's, for every error of this endpoint
            assert "shutting down" in answer.text
            assert "shutting down" in str(ask(server, "too late", model).errors[0])
        assert not any(future.done() for future in asked), "the streams were too short to show anything"
        assert [future.result().errors for future in asked] == [[]] * len(PROMPTS)
        assert [future.result().num_final for future in asked] == [1] * len(PROMPTS)
        drained.result()  # not its status: Triton waits for HTTP connections that were refused, and gives up on them
        assert not drain_marker(server.process.pid).exists()


def test_ctrl_c_lets_an_open_stream_finish(very_slow_repository: tuple[Path, int]) -> None:
    """As a person ends it: the command prints, refuses, waits, and leaves with status 0."""
    folder, vocab_size = very_slow_repository
    with serving(folder, NAME, vocab_size, "--exit-timeout-secs", "40") as served, ThreadPoolExecutor(1) as pool:
        server_pid, begun = served.server_pid, threading.Event()
        core = read_status(instance_address(folder, "engine", 0, server_pid=server_pid).status)
        assert core is not None
        asked = pool.submit(ask, served, PROMPTS[0], NAME, 25, begun)
        assert begun.wait(10)
        os.kill(core.core_pid, signal.SIGSTOP)  # whatever the machine is busy with, the stream is open meanwhile
        try:
            served.process.send_signal(signal.SIGINT)
            assert wait_for(lambda: drain_marker(server_pid).exists() or served.process.poll() is not None)
            assert "shutting down" in str(ask(served, PROMPTS[1], NAME, 2).errors[0])
            assert not asked.done()
        finally:
            os.kill(core.core_pid, signal.SIGCONT)
        finished = asked.result()
        assert finished.errors == [] and finished.num_final == 1
        assert len(finished.joined()) > 0
        assert served.process.wait(timeout=60) == 0
        assert served.has_printed("draining") and not served.has_printed("cut off")
