"""`pageflight serve` with the real server, whose stub processes are killed while they have requests open."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import requests
import tritonclient.grpc as triton
from commands import Served, serving
from grpc_stream import Stream, stream, tensor, text_tensor
from servers import wait_for
from tritonclient.utils import InferenceServerException

from pageflight.core.wire import END_REQUESTS_OF
from pageflight.loop.address import drain_marker
from pageflight_build.triton_config import Deployment, write_repository

NAME = "tiny"
NUM_TOKENS = 60
PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def served(repository: tuple[Path, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """An engine without a model, 20 ms a step; a stub that is silent for 3 s is started again."""
    built, vocab_size = repository
    folder = tmp_path_factory.mktemp("mortal") / "repository"
    fake = json.dumps({"kind": "checking", "vocab_size": vocab_size, "step_s": 0.02})
    write_repository(folder, Deployment(name=NAME, max_num_seqs=16, fake_engine=fake))
    (folder / "engine" / "1" / "artifacts").symlink_to(built / "engine" / "1" / "artifacts", target_is_directory=True)
    with serving(folder, NAME, vocab_size, "--restart-stuck-after", "3", "--exit-timeout-secs", "10") as running:
        yield running


def inputs(model: str, prompt: str, *, streamed: bool) -> list[triton.InferInput]:
    batched = model == "ensemble"
    made = [text_tensor(prompt, batched=batched), tensor("max_tokens", [NUM_TOKENS], "INT32", batched=batched)]
    made += [tensor("ignore_eos", [True], "BOOL", batched=batched)]
    return made + ([tensor("stream", [True], "BOOL", batched=batched)] if streamed else [])


@dataclass
class Open:
    """Requests in the middle of their answers."""

    served: Served
    pool: ThreadPoolExecutor
    streams: dict[str, Future[Stream]] = field(default_factory=dict)

    def start(self, model: str, prompt: str) -> None:
        request = (self.served.grpc, model, inputs(model, prompt, streamed=True))
        self.streams[f"{model}: {prompt}"] = self.pool.submit(stream, *request)

    def wait_until_open(self, **expected: int) -> None:
        def count(model: str) -> int:
            return len(self.served.stub(model).open_requests())

        assert wait_for(lambda: all(count(model) >= number for model, number in expected.items()))


@pytest.fixture
def opened(served: Served) -> Iterator[Open]:
    with ThreadPoolExecutor(8) as pool:
        yield Open(served, pool)


def undisturbed(served: Served, prompt: str) -> str:
    return stream(served.grpc, NAME, inputs(NAME, prompt, streamed=True)).joined()


def noticed_within_s(served: Served) -> list[float]:
    """By the watchdog's own stamps, how long at most each death was not noticed."""
    return [float(found[1]) for line in served.printed if (found := re.search(r"; noticed within (\S+) s;", line))]


def errors(stream: Stream) -> str:
    return " ".join(error.message() for error in stream.errors)


def test_a_dead_text_stub_ends_its_requests_and_comes_back(served: Served, opened: Open) -> None:
    """Triton called the model ready, refused every new request, and its open streams waited for ever."""
    text = undisturbed(served, "one")
    for prompt in ("one", "two", "three"):
        opened.start(NAME, prompt)
    opened.start("ensemble", "one")
    client = triton.InferenceServerClient(served.grpc)
    unary = opened.pool.submit(client.infer, f"{NAME}_unary", inputs(NAME, "one", streamed=False))
    opened.wait_until_open(tiny=3, tiny_unary=1, engine=1)
    served.kill(NAME)
    served.kill(f"{NAME}_unary")
    for prompt in ("one", "two", "three"):
        ended = opened.streams[f"{NAME}: {prompt}"].result(PATIENCE_S)
        assert "the process of tiny that had this request died; send it again" in errors(ended)
    with pytest.raises(InferenceServerException, match=r"UNAVAILABLE.*send it again"):
        unary.result(PATIENCE_S)
    assert opened.streams["ensemble: one"].result(PATIENCE_S).joined() == text
    for model in (NAME, f"{NAME}_unary"):
        assert wait_for(lambda model=model: served.answers(model), PATIENCE_S)  # type: ignore[misc]
        assert served.has_printed(f"watchdog: {model} instance 0") and served.has_printed(f"watchdog: {model} is back")
    assert served.has_printed("died of SIGKILL with 3 open requests")


def test_streams_carry_on_through_the_death_of_the_engine_stub(served: Served, opened: Open) -> None:
    """The engine stub takes the core along; text models waited for a supervisor that nobody started."""
    text = undisturbed(served, "one")
    opened.start(NAME, "one")
    opened.start("ensemble", "one")
    opened.wait_until_open(tiny=1, engine=1)
    served.kill("engine")
    assert "the process of engine that had this request died" in errors(
        opened.streams["ensemble: one"].result(PATIENCE_S)
    )
    carried = opened.streams[f"{NAME}: one"].result(PATIENCE_S)
    assert (carried.joined(), carried.num_final, carried.errors) == (text, 1, [])
    assert wait_for(lambda: served.answers("ensemble"), PATIENCE_S)
    assert served.answers(NAME)


def test_preprocessing_comes_back_with_the_ensemble(served: Served) -> None:
    """Triton unloads the ensemble with any of its steps."""
    for page in served.stubs:
        if page.owner.model == "preprocessing":
            os.kill(page.owner.stub_pid, signal.SIGKILL)
    assert wait_for(lambda: served.has_printed("watchdog: preprocessing is back"), PATIENCE_S)
    assert wait_for(lambda: served.answers("ensemble"), PATIENCE_S)


def test_a_stub_that_hangs_is_told_of_and_started_again(served: Served) -> None:
    """A stopped process counts as ready; its clients wait without an end."""
    served.kill("postprocessing", signal.SIGSTOP)
    assert wait_for(lambda: served.has_printed("watchdog: postprocessing is back"), PATIENCE_S)
    assert served.has_printed("has given no sign of life")


def test_only_the_watchdog_gives_orders(served: Served) -> None:
    """Who may load models may run code."""
    with (
        triton.InferenceServerClient(served.grpc) as client,
        pytest.raises(InferenceServerException, match="restricted"),
    ):
        client.unload_model(NAME)
    refused = requests.post(f"http://{served.http}/v2/repository/models/{NAME}/unload", json={}, timeout=10)
    assert refused.status_code == 403
    assert served.answers(NAME)


@pytest.mark.parametrize("value", ["process", "secret", 1, "text", -1])
def test_nobody_ends_the_requests_of_a_living_stub(served: Served, value: int | str) -> None:
    """The parameter is meant for the watchdog; everybody can send it."""
    owner = served.stub("engine").owner
    given = {"process": owner.stub_pid, "secret": owner.secret}.get(str(value), value)
    query = tensor("QUERY", [b"x"], "BYTES", batched=True)
    client = triton.InferenceServerClient(served.grpc)
    with pytest.raises(InferenceServerException, match=END_REQUESTS_OF):
        client.infer("preprocessing", [query], parameters={END_REQUESTS_OF: given})


def test_deaths_are_noticed_within_two_seconds(served: Served) -> None:
    """It was promised, and tests waited for thirty. How long a look takes on a busy machine is not its doing: one
    death that was noticed in time shows how it looks, and test_watchdog.py that nothing holds it up."""
    found = noticed_within_s(served)
    assert len(found) >= 3 and min(found) < 2, found


def test_a_stub_that_dies_while_the_server_drains_ends_its_requests(served: Served, opened: Open) -> None:
    """Draining began with the end of the watchdog: clients of the dead stub heard "Socket closed" twelve seconds later.
    The last test: it ends the server."""
    opened.start(NAME, "one")
    opened.start("ensemble", "one")
    opened.wait_until_open(tiny=1, engine=1)
    children = psutil.Process(served.process.pid).children(recursive=True)
    served.process.send_signal(signal.SIGTERM)
    assert wait_for(drain_marker(children[0].pid).exists)
    served.kill(NAME)
    ended = opened.streams[f"{NAME}: one"].result(PATIENCE_S)
    assert "the process of tiny that had this request died; send it again" in errors(ended)
    assert not opened.streams["ensemble: one"].result(PATIENCE_S).errors
    assert served.process.wait(timeout=60) == 0
    assert served.has_printed("tiny is not loaded again: the server ends")
    assert not served.has_printed("cut off")
    assert psutil.wait_procs(children, timeout=10)[1] == []
