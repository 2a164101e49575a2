import asyncio
import json
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from perf.peers import genai, openai_load
from perf.workload import Workload


@contextmanager
def openai_server(*, num_missing: int = 0, status: int = 200) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An OpenAI-style server that streams as many tokens as asked for, less `num_missing`."""
    seen: list[dict[str, Any]] = []

    async def completions(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        seen.append(body)
        if status != 200:
            return web.Response(status=status, text="model is loading")
        response = web.StreamResponse()
        await response.prepare(request)
        num_tokens = body["max_tokens"] - num_missing
        for _ in range(num_tokens):
            await response.write(b'data: {"choices": [{"text": "x"}]}\n\n')
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": num_tokens}
        await response.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n")
        return response

    loop = asyncio.new_event_loop()
    started: list[web.AppRunner] = []

    async def start() -> int:
        app = web.Application()
        app.router.add_post("/v1/completions", completions)
        runner = web.AppRunner(app)
        started.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return int(runner.addresses[0][1])

    port = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}", seen
    finally:
        asyncio.run_coroutine_threadsafe(started[0].cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def test_an_openai_server_is_asked_for_exact_lengths() -> None:
    """Peers must do the same work: token ids in, exactly `output` tokens out, greedy."""
    with openai_server() as (base, seen):
        record = openai_load.run(base, "m", Workload.parse("uniq:2:6:8:5"), vocab_size=300, seed=3)
    assert record["out_ok"] and record["in_ok"] and record["responses"] == 30
    assert sorted(body["prompt"] for body in seen) == sorted(Workload.parse("uniq:2:6:8:5").prompts(300, 3))
    assert all(body["ignore_eos"] and body["temperature"] == 0.0 and body["stream"] for body in seen)


def test_an_openai_server_that_answers_less_is_noticed() -> None:
    """Counting chunks instead of the usage record hides joined or missing tokens."""
    with openai_server(num_missing=1) as (base, _):
        assert not openai_load.run(base, "m", Workload.parse("uniq:1:2:8:5"), vocab_size=300, seed=3)["out_ok"]


def test_an_openai_server_that_refuses_ends_the_run() -> None:
    """Refused requests must not count as fast ones."""
    with openai_server(status=503) as (base, _), pytest.raises(openai_load.OpenAIError, match="503: model is loading"):
        openai_load.run(base, "m", Workload.parse("uniq:1:2:8:5"), vocab_size=300, seed=3)


class FakeHandle:
    """A GenAI generation handle that gets one token in every step."""

    def __init__(self) -> None:
        self.num_ready = 0

    def can_read(self) -> bool:
        return self.num_ready > 0

    def read(self) -> dict[int, Any]:
        num_ready, self.num_ready = self.num_ready, 0
        return {0: types.SimpleNamespace(generated_ids=[7] * num_ready)}


class FakePipeline:
    """Counts how many requests are open at most."""

    latest: "FakePipeline"

    def __init__(self, *_: object) -> None:
        self.open: list[list[Any]] = []
        self.max_open = 0
        FakePipeline.latest = self

    def add_request(self, number: int, tensor: Any, wishes: Any) -> FakeHandle:
        handle = FakeHandle()
        self.open.append([handle, wishes.max_new_tokens])
        self.max_open = max(self.max_open, len(self.open))
        return handle

    def step(self) -> None:
        for entry in self.open:
            entry[0].num_ready += 1
            entry[1] -= 1
        self.open = [entry for entry in self.open if entry[1]]


def test_the_genai_driver_keeps_the_closed_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """All requests were added at once: that measures another workload than the one named."""
    fake = types.ModuleType("openvino_genai")
    for name in ("SchedulerConfig", "GenerationConfig"):
        setattr(fake, name, types.SimpleNamespace)
    fake.ContinuousBatchingPipeline = FakePipeline  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "openvino_genai", fake)
    pipeline = genai.Pipeline(Path("ir"), precision="bf16", threads=2, cache_gib=1, prefix_cache=False)
    record = pipeline.run(Workload.parse("uniq:3:9:8:5"), vocab_size=300, seed=1)
    assert FakePipeline.latest.max_open == 3
    assert record["out_ok"] and record["in_ok"] and record["responses"] == 45
