"""A model in stages, each with its layers: the answers of one process, and stages that do not wait for each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engines import MAX_LEN, VOCAB, LoadedEngine, load, make_checkpoint, make_engine, serve, serve_on
from thread_stages import StageCommunicator, ThreadStages

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig
from pageflight.core.manifest import EngineManifest
from pageflight.core.request import Request, SamplingParams
from pageflight.lowering.torch_lowering import TorchLowering
from pageflight.runners.stage_factory import run_stage
from pageflight.runners.stage_runner import StageRunner


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    make_checkpoint(folder / "checkpoint", num_layers=4)
    return make_engine(folder / "checkpoint", folder / "engine", "torch")


def requests(max_tokens: int, length: int = 55) -> list[Request]:
    generator = np.random.default_rng(3)
    common = {"temperature": 1.0, "log_probs": True}
    wishes = [
        SamplingParams(max_tokens=max_tokens),
        SamplingParams(**common, max_tokens=max_tokens, seed=2, top_k=20, n=3),
        SamplingParams(**common, max_tokens=max_tokens, seed=3, top_p=0.9, repetition_penalty=1.3),
        SamplingParams(max_tokens=max_tokens - 5, seed=5, bad_words_ids=((17,), (4, 9))),
        SamplingParams(max_tokens=max_tokens, logit_bias=((50, 2.0),), min_tokens=5, stop_token_ids=(1, 8, 30)),
    ]
    return [
        Request(handle=10 * number, prompt_ids=tuple(generator.integers(2, VOCAB, length).tolist()), sampling=sampling)
        for number, sampling in enumerate(wishes)
    ]


def stages(engine: Path, size: int, num_stages: int, config: EngineConfig) -> tuple[LoadedEngine, SchedulerConfig]:
    """An engine on threads of this process."""
    manifest, capacities = EngineManifest.read(engine), []

    def make(communicator: StageCommunicator) -> StageRunner:
        model = TorchLowering().load_rank(engine, communicator, num_threads=1)
        runner, capacity = run_stage(model, manifest, config, communicator)
        capacities.append(capacity)
        return runner

    runner = ThreadStages(make, size, num_stages)
    return LoadedEngine(runner=runner, manifest=manifest, capacity=capacities[0], num_threads=1), config.scheduler


@pytest.mark.parametrize(("size", "num_stages"), [(1, 2), (1, 4), (2, 2)])
def test_stages_serve_what_one_process_serves(engine: Path, size: int, num_stages: int) -> None:
    """Prompts cut into micro-batches, forks, preemption and swaps, every sampler, two steps in flight: a token that a
    stage does not know yet, or of a row that another has taken since, and the text is another."""
    options = {"num_blocks": 7, "max_num_tokens": 80, "host_memory": 1 << 20}
    alone = serve(engine, requests(16), **options, ahead=True)
    config = EngineConfig(
        kv=KVConfig(num_blocks=7, host_memory_bytes=1 << 20),
        scheduler=SchedulerConfig(max_num_tokens=80, max_num_seqs=8, max_model_len=MAX_LEN, kv_admission="optimistic"),
    )
    loaded, scheduler = stages(engine, size, num_stages, config)
    together = serve_on(loaded, scheduler, requests(16))
    loaded.runner.close()
    assert together.stats.preemptions > 0, "this cache was meant to be too small"
    assert together.ids == alone.ids and together.reasons == alone.reasons
    for handle, log_probs in alone.log_probs.items():
        np.testing.assert_allclose(together.log_probs[handle], log_probs, atol=1e-4)


def test_stages_that_are_processes_serve_what_one_serves(engine: Path) -> None:
    """TP 2 x PP 2 with gloo."""
    alone = serve(engine, requests(16))
    loaded, config = load(engine, tensor_parallel=2, pipeline_parallel=2)
    together = serve_on(loaded, config, requests(16))
    loaded.runner.close()
    assert together.ids == alone.ids
