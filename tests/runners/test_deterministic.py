"""Deterministic serving from end to end: the same ids and the same log probabilities, to the last bit."""

from __future__ import annotations

import os
import queue
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engines import MAX_LEN, VOCAB, Served, make_checkpoint, make_engine, serve

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig
from pageflight.core.errors import ConfigError
from pageflight.core.events import TokenEvent
from pageflight.core.request import Request, SamplingParams
from pageflight.loop.core_process import CoreSpec
from pageflight.loop.front import Front, Generation
from pageflight.loop.local import start_core
from pageflight.loop.status import read_status
from pageflight.runners.factory import load_engine

NUM_REQUESTS = 32
ENGINES = {
    "openvino-fp32": ("openvino", "fp32", ""),
    "openvino-fp32-u8": ("openvino", "fp32", "u8"),
    "openvino-bf16": ("openvino", "bf16", ""),
    "openvino-int8": ("openvino", "int8", ""),
    "openvino-int8-u8": ("openvino", "int8", "u8"),
    "torch-fp32": ("torch", "fp32", ""),
    "torch-bf16": ("torch", "bf16", ""),
}


class Engines:
    """Engine directories by name, and what each answers to every request alone; made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        make_checkpoint(folder / "checkpoint")
        self._alone: dict[str, Served] = {}

    def folder(self, name: str) -> Path:
        if not (self._folder / name).exists():
            lowering, dtype, kv_dtype = ENGINES[name]
            make_engine(self._folder / "checkpoint", self._folder / name, lowering, dtype=dtype, kv_dtype=kv_dtype)
        return self._folder / name

    def alone(self, name: str) -> Served:
        """One sequence after the other, each with the engine and an empty cache to itself."""
        if name not in self._alone:
            self._alone[name] = serve(
                self.folder(name),
                requests(name),
                max_num_seqs=1,
                max_num_tokens=256,
                prefix_cache=False,
                deterministic=True,
            )
        return self._alone[name]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(tmp_path_factory.mktemp("deterministic"))


@pytest.fixture(params=list(ENGINES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def requests(name: str) -> list[Request]:
    """Prompts of 1 to 95 tokens, some of which begin alike; greedy and sampled, with one sequence and several."""
    random = np.random.default_rng(4)
    head = random.integers(2, VOCAB, 64).tolist()
    lengths = [1, 31, 32, 33, 64, 65, 70, 95, *random.integers(1, 95, NUM_REQUESTS - 8).tolist()]
    made = []
    for number, length in enumerate(lengths):
        own = random.integers(2, VOCAB, length).tolist()
        sampling = SamplingParams(max_tokens=45 if number % 4 == 1 else 12 + number % 5, log_probs=True)
        if number % 3 == 0:
            sampling = replace(sampling, temperature=1.0, seed=number, top_p=0.9, repetition_penalty=1.2)
        if number % 8 == 5:
            sampling = replace(sampling, temperature=1.0, seed=number, top_k=30, n=3)
        prompt = tuple((head + own)[:length]) if number % 2 else tuple(own)
        made.append(Request(handle=10 * number, prompt_ids=prompt, sampling=sampling))
    return made[: 12 if name.startswith("torch") else None]  # one after the other takes its time


def check(served: Served, alone: Served) -> None:
    assert set(served.ids) == set(alone.ids)
    for handle, ids in alone.ids.items():
        assert served.ids[handle] == ids, f"sequence {handle}"
        assert served.log_probs[handle] == alone.log_probs[handle], f"sequence {handle}"


def test_a_batch_of_32_gives_what_each_gets_alone(engines: Engines, name: str) -> None:
    served = serve(engines.folder(name), requests(name), max_num_seqs=32, max_num_tokens=256, deterministic=True)
    check(served, engines.alone(name))
    assert max(served.num_cached.values()) >= 32, "prompts were meant to share blocks"


def test_a_tiny_budget_changes_no_bit(engines: Engines, name: str) -> None:
    served = serve(engines.folder(name), requests(name), max_num_seqs=5, max_num_tokens=7, deterministic=True)
    check(served, engines.alone(name))


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preemption_changes_no_bit(engines: Engines, name: str, prefix_cache: bool) -> None:
    served = serve(
        engines.folder(name),
        requests(name),
        num_blocks=6,
        max_num_seqs=12,
        max_num_tokens=100,
        prefix_cache=prefix_cache,
        deterministic=True,
    )
    check(served, engines.alone(name))
    assert served.stats.preemptions > 0, "this cache was meant to be too small"
    assert prefix_cache or served.stats.recomputed_tokens > 0


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_replayed_sequences_go_on_as_they_would_have(engines: Engines, name: str, prefix_cache: bool) -> None:
    """Prompt and output were computed as one chunk, so the last bits of what followed were others."""
    alone, random = engines.alone(name), np.random.default_rng(6)
    replays, kept = [], {}
    for request in requests(name):
        for index in range(request.sampling.n):
            handle = request.handle + index
            kept[handle] = int(random.integers(1, len(alone.ids[handle])))
            replays.append(
                replace(
                    request,
                    handle=handle,
                    sampling=replace(request.sampling, n=1),
                    sequence_index=index,
                    output_ids=tuple(alone.ids[handle][: kept[handle]]),
                )
            )
    served = serve(
        engines.folder(name),
        replays,
        max_num_seqs=32,
        max_num_tokens=90,
        prefix_cache=prefix_cache,
        deterministic=True,
    )
    for handle, count in kept.items():
        assert served.ids[handle] == alone.ids[handle][count:], f"sequence {handle}"
        assert served.log_probs[handle] == alone.log_probs[handle][count:], f"sequence {handle}"


def test_without_the_setting_the_last_bits_differ(engines: Engines) -> None:
    """Else these tests would prove nothing."""
    alone = engines.alone("openvino-fp32")
    served = serve(engines.folder("openvino-fp32"), requests("openvino-fp32"), max_num_seqs=7, max_num_tokens=13)
    assert served.log_probs != alone.log_probs


class NumberText:
    """Ids are their own text."""

    def detokenizer(self, prompt_ids: Sequence[int], *, skip_special_tokens: bool) -> NumberText:
        return self

    def feed(self, ids: Sequence[int]) -> str:
        return "".join(f"{index}," for index in ids)

    def flush(self) -> str:
        return ""


class Answers:
    """Every sequence's ids and log probabilities, by (request, sequence)."""

    def __init__(self) -> None:
        self.ids: dict[tuple[int, int], list[int]] = {}
        self.log_probs: dict[tuple[int, int], list[float]] = {}
        self.num_final = 0
        self._events: queue.SimpleQueue[tuple[int, TokenEvent]] = queue.SimpleQueue()

    def ask(self, front: Front, wanted: list[Request]) -> None:
        for number, request in enumerate(wanted):
            generation = Generation(prompt_ids=request.prompt_ids, sampling=request.sampling, stream=True)
            front.submit(generation, lambda event, number=number: self._events.put((number, event)))

    def take(self) -> None:
        """The next event, whenever it comes."""
        number, event = self._events.get(timeout=60)
        assert event.error is None, event.error
        key = (number, event.sequence_index)
        self.ids.setdefault(key, []).extend(event.ids)
        self.log_probs.setdefault(key, []).extend(event.log_probs)
        self.num_final += event.final


@pytest.mark.parametrize("name", ["openvino-fp32", "openvino-bf16", "openvino-int8-u8"])
def test_killed_cores_change_no_bit(engines: Engines, name: str) -> None:
    """What streams had delivered was computed again as a prompt, and in bf16 every third of them took another turn."""
    longer = [replace(request, sampling=replace(request.sampling, max_tokens=60)) for request in requests(name)]
    num_sequences = sum(request.sampling.n for request in longer)
    spec = CoreSpec(
        config=EngineConfig(
            kv=KVConfig(memory_bytes=1 << 23),
            scheduler=SchedulerConfig(max_num_seqs=16, max_num_tokens=128, max_model_len=MAX_LEN, deterministic=True),
            num_threads=2,
        ),
        engine_dir=str(engines.folder(name)),
    )
    with start_core(spec, NumberText()) as front:
        calm, killed = Answers(), Answers()
        for answers, num_kills in ((calm, 0), (killed, 3)):
            answers.ask(front, longer)
            for number in range(num_kills):
                while sum(map(len, answers.ids.values())) < 300 * (number + 1):
                    answers.take()
                assert answers.num_final < num_sequences, "everything was over before the core was killed"
                status = read_status(front._address.status)
                assert status is not None
                os.kill(status.core_pid, signal.SIGKILL)
            while answers.num_final < num_sequences:
                answers.take()
    assert killed.ids == calm.ids
    assert killed.log_probs == calm.log_probs


def test_an_engine_that_cannot_is_refused_at_the_start(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pageflight.lowering.company.Company.first_difference", lambda self, sizes: "a row differs")
    config = EngineConfig(kv=KVConfig(num_blocks=8), scheduler=SchedulerConfig(deterministic=True, max_model_len=64))
    with pytest.raises(ConfigError, match=r"deterministic=True: .*lowering openvino, dtype fp32.*a row differs"):
        load_engine(engines.folder("openvino-fp32"), config)
    load_engine(engines.folder("openvino-fp32"), replace(config, scheduler=SchedulerConfig(max_model_len=64)))
