"""Stages on GPUs, their kernels in Triton's interpreter: the ids of one process on its processor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from device_stages import DeviceStages
from engines import MAX_LEN, VOCAB, LoadedEngine, Served, make_checkpoint, make_engine, serve, serve_on

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig
from pageflight.core.manifest import EngineManifest
from pageflight.core.plan import RowStart, StepPlan
from pageflight.core.request import Request, SamplingParams
from pageflight.lowering import device_model
from pageflight.lowering.device_blocks import DeviceInputs
from pageflight.runners.base import BusyRunner
from pageflight.runners.device import DeviceRunner
from pageflight.runners.device_factory import load_on_gpu


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    make_checkpoint(folder / "checkpoint", num_layers=2)
    return make_engine(folder / "checkpoint", folder / "engine", "torch")


def asked(number: int, num_prompt: int, **wishes: object) -> Request:
    ids = np.random.default_rng(number).integers(2, VOCAB, num_prompt)
    sampling = SamplingParams(**{"max_tokens": 5, "seed": number, **wishes})
    return Request(handle=10 * number, prompt_ids=tuple(ids.tolist()), sampling=sampling)


def served(engine: Path, requests: list[Request], size: int, num_stages: int, config: EngineConfig) -> Served:
    runner = DeviceStages(engine, config, size, num_stages)
    assert all(isinstance(each, BusyRunner) for each in runner.runners), "or nobody learns of bubbles"
    loaded = LoadedEngine(runner=runner, manifest=EngineManifest.read(engine), capacity=runner.capacity, num_threads=1)
    found = serve_on(loaded, config.scheduler, requests)
    assert all(each.busy_s > 0 for each in runner.runners)
    runner.close()
    return found


def config_of(num_blocks: int, max_num_tokens: int, **kv: int) -> EngineConfig:
    return EngineConfig(
        kv=KVConfig(num_blocks=num_blocks, **kv),
        scheduler=SchedulerConfig(
            max_num_tokens=max_num_tokens, max_num_seqs=8, max_model_len=MAX_LEN, kv_admission="optimistic"
        ),
    )


def test_stages_on_kernels_serve_what_one_process_serves(engine: Path) -> None:
    """Prompts cut into micro-batches, forks, preemption and swaps, every sampler, two steps in flight: an id that came
    to a row that another has taken, or a micro-batch that ran before the ids of its rows were there."""
    common = {"temperature": 1.0, "log_probs": True}
    requests = [
        asked(0, 33),
        asked(1, 30, **common, top_k=20, n=2),
        asked(2, 31, **common, top_p=0.9, repetition_penalty=1.3, bad_words_ids=((17,), (4, 9))),
        asked(4, 31, logit_bias=((50, 2.0),), min_tokens=4, stop_token_ids=(1, 8, 30)),
    ]
    options = {"num_blocks": 5, "max_num_tokens": 48}
    alone = serve(engine, requests, **options, host_memory=1 << 18, ahead=True)
    together = served(engine, requests, 1, 2, config_of(**options, host_memory_bytes=1 << 18))
    assert together.stats.preemptions > 0 and together.stats.swaps_in > 0, "this cache was meant to be too small"
    assert together.ids == alone.ids and together.reasons == alone.reasons
    for handle, log_probs in alone.log_probs.items():
        np.testing.assert_allclose(together.log_probs[handle], log_probs, atol=1e-4)


@pytest.mark.parametrize(("size", "num_stages", "dtype", "kv_dtype"), [(2, 2, "fp32", "fp32"), (1, 3, "int8", "fp8")])
def test_ranks_of_stages_and_narrow_weights_serve_what_one_device_serves(
    tmp_path: Path,
    size: int,
    num_stages: int,
    dtype: str,
    kv_dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    rounds_to_e4m3: None,
) -> None:
    """Scales of another layer, blocks of the whole model's layers on each stage, sums over the ranks of both."""
    monkeypatch.setitem(device_model.COMPUTE, dtype, torch.float32)  # the interpreter casts bf16 otherwise than GPUs
    make_checkpoint(tmp_path / "checkpoint", num_layers=num_stages)
    engine = make_engine(tmp_path / "checkpoint", tmp_path / "engine", "torch", dtype=dtype, kv_dtype=kv_dtype)
    requests = [asked(0, 9, max_tokens=3), asked(1, 5, temperature=1.0, top_k=9, presence_penalty=0.5, max_tokens=3)]
    config = config_of(10, 16)
    runner, capacity = load_on_gpu(engine, config, torch.device("cpu"))
    manifest = EngineManifest.read(engine)
    loaded = LoadedEngine(runner=runner, manifest=manifest, capacity=capacity, num_threads=1)
    alone = serve_on(loaded, config.scheduler, requests)
    runner.close()
    stages = DeviceStages(engine, config, size, num_stages)
    caches = [each._model.blocks.cache for each in stages.runners]
    assert {(len(cache), cache.shape[3]) for cache in caches} == {(1, 2 // size)}, "its own layer and K/V heads"
    loaded = LoadedEngine(runner=stages, manifest=manifest, capacity=stages.capacity, num_threads=1)
    assert serve_on(loaded, config.scheduler, requests).ids == alone.ids
    names = [set(each._model._ops._weights) for each in stages.runners]
    assert names[0].isdisjoint(names[-1]) and "embed" in names[0] and "head" in names[-1]
    stages.close()


def test_sizes_of_the_cache_are_shared_by_all_ranks_of_all_stages(tmp_path: Path) -> None:
    """Three layers on two stages: one has twice as much of every block, and of the memory that was asked for."""
    make_checkpoint(tmp_path / "checkpoint", num_layers=3)
    engine = make_engine(tmp_path / "checkpoint", tmp_path / "engine", "torch")
    block_bytes = 3 * 2 * 2 * 32 * 16 * 4
    kv = {"memory_bytes": 11 * block_bytes + 5, "host_memory_bytes": 3 * block_bytes + 1}
    stages = DeviceStages(engine, config_of(0, 16, **kv), 1, 2)
    found = [(each.limits.num_blocks, each.limits.num_host_blocks) for each in stages.runners]
    assert found == [(11, 3), (11, 3)]
    assert sorted(len(each._model.blocks.cache) for each in stages.runners) == [1, 2]
    stages.close()


def step(number: int, chunks: list[tuple[int, int, int, bool]], **changes: object) -> StepPlan:
    """Of (row, where it begins, length, whether it samples)."""
    rows, begins, lengths, samples = np.array(chunks, np.int32).T
    return StepPlan(
        step=number, rows=rows, starts_at=begins, lengths=lengths, samples=samples.astype(np.bool_), **changes
    )


def test_an_id_of_a_row_that_another_has_taken_is_nobody_s(engine: Path) -> None:
    """It came to the first stage after the row had begun anew, and stood in the middle of the new prompt."""
    prompts = np.random.default_rng(5).integers(2, VOCAB, (4, 20)).astype(np.int32)
    short, long = (
        tuple(RowStart(row, row, 0, prompts[first + row, :size], size, SamplingParams()) for row in (0, 1))
        for first, size in ((0, 4), (2, 20))
    )
    tables = {f"table_{name}": np.array([0, 1], np.int32) for name in ("rows", "blocks")}
    plans = [
        step(0, [(0, 0, 4, True), (1, 0, 4, True)], starts=short, table_columns=np.zeros(2, np.int32), **tables),
        step(1, [(0, 0, 3, False)], starts=long, ended_rows=(0, 1)),
        step(2, [(0, 3, 17, True), (1, 0, 20, True)]),
    ]
    config = config_of(10, 40)
    alone = load_on_gpu(engine, config, torch.device("cpu"))[0]
    stages = DeviceStages(engine, config, 1, 2)
    found: list[list[list[int]]] = [[], []]
    for ids, runner in zip(found, (alone, stages), strict=True):
        runner.submit(plans[0])
        for plan in plans[1:]:  # two in flight
            runner.submit(plan)
            ids.append(runner.collect().sampled_ids.tolist())
        ids.append(runner.collect().sampled_ids.tolist())
        runner.close()
    assert found[1] == found[0] and len(found[0][2]) == 2


def test_what_a_captured_pass_writes_is_sent_before_it_is_written_again(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph's output and input lie in one place: the second micro-batch overtook the first on its way."""
    asked_for = [asked(number, 4, max_tokens=3) for number in range(2)]
    expected = serve(engine, asked_for).ids
    inputs: list[int] = []

    def captured(runner: DeviceRunner) -> None:
        run, forward, places = runner._graphs.run, runner._model.forward, {}

        def again(*arguments: object) -> torch.Tensor:
            out = run(*arguments)
            return places.setdefault(out.shape, torch.empty_like(out)).copy_(out)

        def spied(given: DeviceInputs) -> torch.Tensor:
            if given.hidden_TH is not None and given.lens_S is not None:
                inputs.append(given.hidden_TH.data_ptr())
            return forward(given)

        submit, send, late = runner.submit, runner._line.pass_on, []

        def submitted(plan: StepPlan) -> None:
            submit(plan)
            while late:
                send(late.pop(0))

        monkeypatch.setattr(runner, "submit", submitted)
        monkeypatch.setattr(runner._line, "pass_on", late.append, raising=False)
        monkeypatch.setattr(runner._graphs, "run", again)
        monkeypatch.setattr(runner._model, "forward", spied)

    config = config_of(10, 40)
    stages = DeviceStages(engine, config, 1, 2)
    for runner in stages.runners:
        captured(runner)
    manifest = EngineManifest.read(engine)
    loaded = LoadedEngine(runner=stages, manifest=manifest, capacity=stages.capacity, num_threads=1)
    assert serve_on(loaded, config.scheduler, asked_for).ids == expected
    assert len(inputs) == 4 and len(set(inputs)) == 1, "two decode steps of two micro-batches"
    stages.close()
