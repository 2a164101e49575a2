"""Stages on GPUs, their kernels in Triton's interpreter: the ids of one process on its processor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from device_stages import DeviceStages
from engines import MAX_LEN, VOCAB, LoadedEngine, Served, make_checkpoint, make_engine, serve, serve_on

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig
from pageflight.core.manifest import EngineManifest
from pageflight.core.request import Request, SamplingParams


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
    loaded = LoadedEngine(
        runner=runner, manifest=EngineManifest.read(engine), capacity=runner.capacity, num_threads=1
    )
    found = serve_on(loaded, config.scheduler, requests)
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
    common = {"temperature": 1.0, "log_probs": True, "max_tokens": 7}
    requests = [
        asked(0, 33, max_tokens=7),
        asked(1, 30, **common, top_k=20, n=2),
        asked(2, 31, **common, top_p=0.9, repetition_penalty=1.3),
        asked(3, 29, bad_words_ids=((17,), (4, 9)), max_tokens=7),
        asked(4, 31, logit_bias=((50, 2.0),), min_tokens=5, stop_token_ids=(1, 8, 30), max_tokens=7),
    ]
    options = {"num_blocks": 5, "max_num_tokens": 48}
    alone = serve(engine, requests, **options, host_memory=1 << 18, ahead=True)
    together = served(engine, requests, 1, 2, config_of(**options, host_memory_bytes=1 << 18))
    assert together.stats.preemptions > 0 and together.stats.swaps_in > 0, "this cache was meant to be too small"
    assert together.ids == alone.ids and together.reasons == alone.reasons
    for handle, log_probs in alone.log_probs.items():
        np.testing.assert_allclose(together.log_probs[handle], log_probs, atol=1e-4)
