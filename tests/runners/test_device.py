"""The runner for GPUs, in Triton's interpreter on the CPU: the same requests, the same ids as from the local one."""

from __future__ import annotations

import logging
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import make_checkpoint, make_engine, serve

from pageflight.core.config import EngineConfig, KVAdmission, KVConfig, SchedulerConfig
from pageflight.core.errors import ConfigError
from pageflight.core.manifest import EngineManifest
from pageflight.core.plan import RowStart, StepPlan
from pageflight.core.request import Request, SamplingParams
from pageflight.kernels import attention_decode, tuning
from pageflight.kernels.tuning import AttentionTiles, Choice
from pageflight.loop.engine_loop import Drain, EngineLoop, Submit
from pageflight.loop.in_memory import InMemoryMailbox
from pageflight.lowering import device_blocks
from pageflight.lowering.device_model import KernelModel
from pageflight.lowering.engine_dir import open_engine
from pageflight.lowering.torch_lowering import TorchLowering
from pageflight.runners import device, device_factory, device_rows
from pageflight.runners.device import DeviceRunner
from pageflight.runners.local import LocalRunner
from pageflight.sched.scheduler import Scheduler

MAX_LEN = 96


@pytest.fixture(scope="module")
def fp8_cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model whose K/V blocks are e4m3."""
    folder = tmp_path_factory.mktemp("fp8")
    make_checkpoint(folder / "checkpoint")
    return make_engine(folder / "checkpoint", folder / "engine", "torch", MAX_LEN, kv_dtype="fp8")


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device")
    make_checkpoint(folder / "checkpoint")
    return make_engine(folder / "checkpoint", folder / "engine", "torch", MAX_LEN)


@pytest.fixture(scope="module")
def shallow_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer: half of the time, where it is rows and not layers that could be mistaken for each other."""
    folder = tmp_path_factory.mktemp("shallow")
    make_checkpoint(folder / "checkpoint", num_layers=1)
    return make_engine(folder / "checkpoint", folder / "engine", "torch", MAX_LEN)


def runner_of(engine_dir: Path, *, num_blocks: int, num_host_blocks: int = 0, max_num_seqs: int = 8) -> DeviceRunner:
    model = KernelModel.load(open_engine(engine_dir, "torch"), torch.device("cpu"))
    return DeviceRunner(
        model,
        num_blocks=num_blocks,
        num_host_blocks=num_host_blocks,
        max_num_seqs=max_num_seqs,
        max_num_tokens=40,
        max_model_len=MAX_LEN,
    )


def asked(handle: int, num_prompt: int, **wishes: object) -> Request:
    ids = np.random.default_rng(handle).integers(2, 190, num_prompt)
    sampling = SamplingParams(**{"max_tokens": 5, "seed": handle, **wishes})
    return Request(handle=handle, prompt_ids=tuple(ids.tolist()), sampling=sampling)


def served_on_device(
    runner: DeviceRunner,
    requests: list[Request],
    *,
    ahead: bool,
    kv_admission: KVAdmission = "forecast",
    max_num_tokens: int = 40,
) -> tuple[dict[int, list[int]], dict[int, list[float]], Scheduler]:
    limits = runner.limits
    config = SchedulerConfig(
        max_num_tokens=max_num_tokens,
        max_num_seqs=limits.max_num_seqs,
        max_model_len=MAX_LEN,
        kv_admission=kv_admission,
    )
    kv = KVConfig(num_blocks=limits.num_blocks, block_size=limits.block_size)
    scheduler = Scheduler(config, kv, vocab_size=limits.vocab_size)
    mailbox = InMemoryMailbox()
    mailbox.send(*[Submit(each) for each in requests], Drain())
    EngineLoop(scheduler=scheduler, runner=runner, mailbox=mailbox, ahead=ahead).run()
    runner.close()
    assert not mailbox.take_rejections()
    ids: dict[int, list[int]] = defaultdict(list)
    log_probs: dict[int, list[float]] = defaultdict(list)
    for events in mailbox.take_events():
        for index, handle in enumerate(events.handles.tolist()):
            ids[handle].append(int(events.ids[index]))
            if events.log_probs is not None:
                log_probs[handle].append(float(events.log_probs[index]))
    return dict(ids), dict(log_probs), scheduler


@pytest.mark.parametrize("ahead", [False, True])
def test_ids_are_those_of_the_local_runner(shallow_dir: Path, ahead: bool) -> None:
    """Prompts in chunks beside decoding rows, greedy and sampled, rows taken anew: whatever the device mirrors of a row
    would show."""
    requests = [
        asked(0, 33),
        asked(1, 5, temperature=1.0, max_tokens=3),
        asked(2, 9, temperature=0.8, top_k=12, max_tokens=2),
        asked(3, 31, temperature=1.2, top_p=0.7, log_probs=True, max_tokens=3),
        asked(4, 32, max_tokens=3),
        asked(5, 1, temperature=1.0, min_p=0.05, max_tokens=2),
        asked(6, 3, max_tokens=2),
    ]
    expected = serve(shallow_dir, requests, max_num_tokens=24)
    runner = runner_of(shallow_dir, num_blocks=12, max_num_seqs=4)
    ids, log_probs, _ = served_on_device(runner, requests, ahead=ahead, max_num_tokens=24)
    assert ids == expected.ids
    assert log_probs[3] == pytest.approx(expected.log_probs[3], abs=1e-4)


def wishes_of(rng: np.random.Generator) -> dict[str, object]:
    """A few of everything that sampling can be asked for."""
    wishes: dict[str, object] = {
        "temperature": 1.0,
        "top_k": 9,
        "repetition_penalty": 1.4,
        "presence_penalty": 0.8,
        "frequency_penalty": -0.6,
        "logit_bias": tuple((int(token), float(rng.normal()) * 3) for token in rng.integers(0, 220, 30)),
        "bad_words_ids": tuple(tuple(rng.integers(0, 199, size).tolist()) for size in (1, 1, 2, 3)),
        "stop_token_ids": tuple(rng.integers(0, 199, 40).tolist()),
        "min_tokens": 5,
        "log_probs": True,
    }
    return {name: value for name, value in wishes.items() if rng.random() < 0.5}


def test_rows_with_wishes_are_sampled_on_the_device_two_steps_deep(shallow_dir: Path) -> None:
    """Lists, counts and lengths are the row's own there, and begin again with what a preempted sequence brings. The
    host once sampled such steps, and nothing could run meanwhile."""
    runner = runner_of(shallow_dir, num_blocks=5)
    runner.warm_up(1)
    rng = np.random.default_rng(12)
    wishes = [wishes_of(rng) for _ in range(5)]
    assert len(set().union(*wishes)) == 10, "each of them, by some row"
    requests = [asked(number, 28 + number, max_tokens=8, **wishes[number]) for number in range(5)]
    expected = serve(shallow_dir, requests, max_num_tokens=40)
    ids, log_probs, scheduler = served_on_device(runner, requests, ahead=True, kv_admission="optimistic")
    assert ids == expected.ids, "warming up leaves no trace in rows or blocks"
    assert scheduler.stats().preemptions > 0, "this test is about rows that begin again"
    for handle in [each.handle for each in requests if each.sampling.log_probs]:
        assert log_probs[handle] == pytest.approx(expected.log_probs[handle], abs=1e-4)


def test_decode_steps_are_cut_as_was_measured_on_the_card(
    engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `gpu_check tune` writes has to reach the kernel; ids do not depend on it."""
    expected = served_on_device(runner_of(engine_dir, num_blocks=8), [asked(0, 40)], ahead=False)[0]
    monkeypatch.setattr(tuning, "gpu_name", lambda device: "Fake X9")
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(attention_decode, "MIN_KEYS_PER_SPLIT", 16)
    tiles = AttentionTiles(keys=16, num_splits=3, num_warps=8, num_stages=1)
    fp32 = torch.float32
    key = tuning.attention_key(attention_decode.KERNEL, fp32, fp32, 1, 4, 2, 16, context=MAX_LEN)
    tuning.write(tuning.file_of("Fake X9"), "Fake X9", {key: Choice(tiles=tiles, microseconds=1.0)})
    launches: list[tuple[Any, ...]] = []
    attend = device_blocks.decode_attention

    def spy(*tensors: torch.Tensor, **settings: Any) -> None:
        launches.append((settings["tiles"], settings["workspace"].num_splits))
        attend(*tensors, **settings)

    monkeypatch.setattr(device_blocks, "decode_attention", spy)
    try:
        assert served_on_device(runner_of(engine_dir, num_blocks=8), [asked(0, 40)], ahead=False)[0] == expected
    finally:
        tuning.stored.cache_clear()
    assert launches and set(launches) == {(tiles, 3)}


def test_rows_that_decode_beside_chunks_are_split_where_their_contexts_are_long(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps with a chunk are most of a busy server's: one program per long row made the whole step wait."""
    requests = [asked(0, 45, max_tokens=5), asked(1, 60, max_tokens=2)]
    expected = serve(engine_dir, requests, max_num_tokens=40)
    tiles = AttentionTiles(keys=16, num_splits=2, num_warps=4, num_stages=1)
    monkeypatch.setattr(device, "default_tiles", lambda *sizes: tiles)
    for module in (device, device_blocks, device_rows):
        monkeypatch.setattr(module, "LONG_CONTEXT", 45)
    lens: list[list[int]] = []
    attend = device_blocks.decode_attention

    def spy(*tensors: torch.Tensor, **settings: Any) -> None:
        if settings.get("tokens_R") is not None:
            lens.append(tensors[5].tolist())
        attend(*tensors, **settings)

    monkeypatch.setattr(device_blocks, "decode_attention", spy)
    runner = runner_of(engine_dir, num_blocks=40)
    assert served_on_device(runner, requests, ahead=True)[0] == expected.ids
    assert any(sum(length > 0 for length in each) and 0 in each for each in lens), "rows of both kinds in a step"


def test_an_answer_that_a_bad_word_would_complete_goes_another_way(engine_dir: Path) -> None:
    """The device knows the tail of a row's tokens, those of a step whose ids the host has not seen included."""
    free = [asked(number, 9 + number, max_tokens=6) for number in range(2)]
    ids = served_on_device(runner_of(engine_dir, num_blocks=8), free, ahead=True)[0]
    words = [(tuple(ids[0][1:4]),), (tuple(ids[1][:2]),)]
    bound = [asked(number, 9 + number, max_tokens=6, bad_words_ids=words[number]) for number in range(2)]
    found = served_on_device(runner_of(engine_dir, num_blocks=8), bound, ahead=True)[0]
    assert found[0][:3] == ids[0][:3] and found[0][3] != ids[0][3]
    assert found[1][0] == ids[1][0] and found[1][1] != ids[1][1]
    assert found == serve(engine_dir, bound, max_num_tokens=40).ids


def test_an_engine_is_loaded_onto_a_device_with_its_blocks(engine_dir: Path) -> None:
    """What a GPU has left is for blocks; here the device is the processor, and its memory the host's."""
    config = EngineConfig(
        kv=KVConfig(memory_bytes=1 << 20, host_memory_bytes=1 << 18),
        scheduler=SchedulerConfig(max_num_tokens=40, max_num_seqs=4, max_model_len=4096),
    )
    runner, capacity = device_factory.load_on_gpu(engine_dir, config, torch.device("cpu"))
    assert capacity.num_bytes <= 1 << 20 and capacity.kv.num_host_blocks == runner.limits.num_host_blocks > 0
    assert runner.limits.max_model_len == MAX_LEN and runner.limits.max_in_flight == 2
    runner.close()
    refused = replace(config, scheduler=replace(config.scheduler, deterministic=True))
    with pytest.raises(ConfigError, match="deterministic"):
        device_factory.load_on_gpu(engine_dir, refused, torch.device("cpu"))


def test_tensorrt_engines_that_the_card_does_not_take_run_on_our_kernels(
    engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The weights are the same; that the speed is another has to be told."""
    folder = shutil.copytree(engine_dir, tmp_path / "engine")
    replace(EngineManifest.read(folder), lowering="tensorrt").write(folder)

    def refuse(*arguments: object, **options: object) -> None:
        raise ConfigError("first.engine: rtx TensorRT does not take it on Some GPU")

    monkeypatch.setattr(device_factory, "load_segments", refuse)
    caplog.set_level(logging.WARNING, "pageflight.runners.device_factory")
    config = EngineConfig(kv=KVConfig(num_blocks=12), scheduler=SchedulerConfig(max_num_tokens=40, max_num_seqs=8))
    runner, _ = device_factory.load_on_gpu(folder, config, torch.device("cpu"))
    requests = [asked(0, 9, max_tokens=3)]
    assert served_on_device(runner, requests, ahead=False)[0] == serve(engine_dir, requests, max_num_tokens=40).ids
    assert "does not take it on Some GPU; it runs on kernels of our own instead" in caplog.text


def plan_of(
    step: int,
    chunks: list[tuple[int, int, int]],
    *,
    starts: tuple[RowStart, ...] = (),
    ended: tuple[int, ...] = (),
    table: list[tuple[int, int, int]] | None = None,
    **copies: list[int],
) -> StepPlan:
    rows, begins, lengths = np.array(chunks, np.int32).reshape(-1, 3).T
    updates = None if table is None else np.array(table, np.int32).T
    return StepPlan(
        step=step,
        rows=rows,
        starts_at=begins,
        lengths=lengths,
        samples=np.ones(len(rows), np.bool_),
        starts=starts,
        ended_rows=ended,
        table_rows=None if updates is None else updates[0],
        table_columns=None if updates is None else updates[1],
        table_blocks=None if updates is None else updates[2],
        **{name: np.array(ids, np.int32) for name, ids in copies.items()},
    )


@pytest.mark.parametrize("cache", ["engine_dir", "fp8_cache_dir"])
def test_blocks_come_back_from_the_host_and_are_copied(
    cache: str, request: pytest.FixtureRequest, rounds_to_e4m3: None
) -> None:
    """A row goes to the host and comes back as another one in other blocks, which is then forked."""
    engine_dir: Path = request.getfixturevalue(cache)
    local = LocalRunner(
        TorchLowering().load(engine_dir, num_threads=1),
        num_blocks=8,
        num_host_blocks=4,
        max_num_seqs=8,
        max_model_len=MAX_LEN,
    )
    on_device = runner_of(engine_dir, num_blocks=8, num_host_blocks=4)
    prompt = np.array(asked(0, 40).prompt_ids, np.int32)
    sampling = SamplingParams(temperature=1.0, seed=3, max_tokens=9)
    known = list(prompt)

    def both(plan: StepPlan) -> list[int]:
        for runner in (local, on_device):
            runner.submit(plan)
        (ids, others) = (runner.collect().sampled_ids.tolist() for runner in (local, on_device))
        assert ids == others
        return ids

    start = RowStart(0, 0, 0, prompt, 40, sampling)
    known += both(plan_of(0, [(0, 0, 40)], starts=(start,), table=[(0, 0, 0), (0, 1, 1)]))
    start = RowStart(5, 1, 0, np.array(known, np.int32), 40, sampling)
    moves = {"copy_out_blocks": [0, 1], "copy_out_slots": [3, 1], "copy_in_slots": [1, 3], "copy_in_blocks": [2, 6]}
    known += both(plan_of(1, [(5, 40, 1)], starts=(start,), ended=(0,), table=[(5, 0, 6), (5, 1, 2)], **moves))
    start = RowStart(7, 2, 1, np.array(known, np.int32), 40, sampling)
    copies = {"copy_sources": [2], "copy_targets": [4]}
    ids = both(plan_of(2, [(5, 41, 1), (7, 41, 1)], starts=(start,), table=[(7, 0, 6), (7, 1, 4)], **copies))
    assert ids[0] != ids[1], "answers with other random numbers"
    both(plan_of(3, [(5, 42, 1), (7, 42, 1)]))
    both(plan_of(4, [], ended=(5, 7)))


def test_answers_of_one_prompt_share_its_blocks_until_they_part(engine_dir: Path) -> None:
    """A fork copies the last block before it writes to it."""
    requests = [replace(asked(0, 45), sampling=SamplingParams(n=3, temperature=1.0, seed=4, max_tokens=6))]
    one, other = (
        serve(engine_dir, requests, max_num_tokens=40).ids,
        served_on_device(runner_of(engine_dir, num_blocks=30), requests, ahead=False)[0],
    )
    assert one == other and len(one) == 3
