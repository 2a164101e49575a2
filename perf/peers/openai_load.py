"""Workloads against an OpenAI-style server (/v1/completions, streamed): the same loop as perf.wire's."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator

import aiohttp

from perf import figures
from perf.workload import Workload


class OpenAIError(Exception):
    """The server refused a request or ended it without a token."""


async def _ask(session: aiohttp.ClientSession, url: str, body: bytes) -> figures.Answer:
    answer = figures.Answer(time.perf_counter())
    async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
        if response.status != 200:
            raise OpenAIError(f"HTTP {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            now_s = time.perf_counter()
            event = json.loads(line[6:])
            if event.get("error"):
                raise OpenAIError(str(event["error"])[:300])
            if event.get("choices"):
                answer.arrivals_s.append(now_s)
            if usage := event.get("usage"):
                answer.num_input, answer.num_output = usage["prompt_tokens"], usage["completion_tokens"]
    if not answer.arrivals_s:
        raise OpenAIError("the answer ended without a token")
    return answer


async def _drive(url: str, bodies: list[bytes], concurrency: int) -> list[figures.Answer]:
    answers: list[figures.Answer] = []

    async def client(session: aiohttp.ClientSession, rest: Iterator[bytes]) -> None:
        for body in rest:
            answers.append(await _ask(session, url, body))

    # a connection for each request: servers of this kind close idle ones at moments of their own choosing
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=900)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=2**20) as session:
        rest = iter(bodies)
        await asyncio.gather(*(client(session, rest) for _ in range(concurrency)))
    return answers


def run(base: str, model: str, workload: Workload, *, vocab_size: int, seed: int) -> figures.Record:
    """Drives one workload with prompts of token ids. Raises OpenAIError at the first refusal."""
    bodies = [
        json.dumps(
            {
                "model": model,
                "prompt": prompt,
                "max_tokens": workload.num_output,
                "temperature": 0.0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        for prompt in workload.prompts(vocab_size, seed)
    ]
    cpu_s, started_s = time.process_time(), time.perf_counter()
    answers = asyncio.run(_drive(f"{base}/v1/completions", bodies, workload.concurrency))
    wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
    return figures.summarise(workload, answers, wall_s=wall_s, cpu_s=cpu_s, seed=seed)
