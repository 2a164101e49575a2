"""Scheduler, loop, LocalRunner and both lowerings together, against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engines import MAX_LEN, VOCAB, load, make_checkpoint, make_engine, serve

from pageflight.core.config import EngineConfig, SchedulerConfig
from pageflight.core.errors import ConfigError, ManifestMismatch
from pageflight.core.request import Request, SamplingParams
from pageflight.runners.factory import load_engine, num_usable_cores

LENGTHS = (3, 33, 70, 1, 64, 96, 31, 5)
COUNT = 36


class Bench:
    """The reference model and its engines, made once."""

    def __init__(self, folder: Path) -> None:
        self.reference = make_checkpoint(folder / "checkpoint")
        self.engines = {name: make_engine(folder / "checkpoint", folder / name, name) for name in ("torch", "openvino")}
        self._texts: dict[tuple[int, ...], list[int]] = {}

    def greedy(self, prompt: tuple[int, ...]) -> list[int]:
        """`COUNT` ids by transformers, generated once for each prompt."""
        if prompt not in self._texts:
            out = self.reference.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
                max_new_tokens=COUNT,
                min_new_tokens=COUNT,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            self._texts[prompt] = [int(token) for token in out[0, len(prompt) :]]
        return self._texts[prompt]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(params=["torch", "openvino"])
def lowering(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def prompts() -> list[tuple[int, ...]]:
    """Of different lengths; those longer than a block begin alike, so that they share blocks."""
    generator = np.random.default_rng(2)
    head = generator.integers(2, VOCAB, 40).tolist()
    own = [generator.integers(2, VOCAB, length).tolist() for length in LENGTHS]
    return [tuple((head + ids)[:length] if length > 32 else ids) for ids, length in zip(own, LENGTHS, strict=True)]


def requests(sampling: list[SamplingParams]) -> list[Request]:
    pairs = zip(prompts(), sampling, strict=True)
    return [
        Request(handle=10 * number, prompt_ids=prompt, sampling=params) for number, (prompt, params) in enumerate(pairs)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_tokens": 512},
        {"max_num_tokens": 13},
        {"max_num_tokens": 16, "prefix_cache": False},
        {"num_blocks": 7, "max_num_tokens": 40},
        {"num_blocks": 7, "max_num_tokens": 40, "ahead": True},
        {"max_num_tokens": 64, "ahead": True},
        {"num_blocks": 7, "max_num_tokens": 40, "prefix_cache": False},
        {"num_blocks": 7, "max_num_tokens": 40, "host_memory": 1 << 20},
        {"num_blocks": 7, "max_num_tokens": 40, "host_memory": 1 << 20, "ahead": True},
        {"num_blocks": 7, "max_num_tokens": 40, "host_memory": 1 << 20, "prefix_cache": False},
    ],
    ids=[
        "whole prompts",
        "odd chunks",
        "no prefix cache",
        "preemption",
        "preemption, planned ahead",
        "planned ahead",
        "preemption without cache",
        "swapping",
        "swapping, planned ahead",
        "swapping without cache",
    ],
)
def test_greedy_text_equals_transformers(bench: Bench, lowering: str, options: dict[str, int]) -> None:
    served = serve(bench.engines[lowering], requests([SamplingParams(max_tokens=COUNT)] * len(LENGTHS)), **options)
    for request in requests([SamplingParams()] * len(LENGTHS)):
        assert served.ids[request.handle] == bench.greedy(request.prompt_ids), len(request.prompt_ids)
    assert set(served.reasons.values()) == {"length"}
    if "num_blocks" in options:
        assert served.stats.preemptions > 0, "this cache was meant to be too small"
        assert (served.stats.swaps_in > 0) == ("host_memory" in options)
    if options["max_num_tokens"] == 13:
        assert max(served.num_cached.values()) >= 32, "the prompts were meant to share a block"


def mixed_sampling() -> list[SamplingParams]:
    common = {"temperature": 1.0, "max_tokens": 24, "log_probs": True}
    return [
        SamplingParams(**common, seed=1),
        SamplingParams(**common, seed=2, top_k=20, n=3),
        SamplingParams(**common, seed=3, top_p=0.9, repetition_penalty=1.3),
        SamplingParams(**common, seed=4, presence_penalty=0.7, frequency_penalty=0.3),
        SamplingParams(**common, seed=5, min_p=0.05, bad_words_ids=((17,), (4, 9))),
        SamplingParams(**common, seed=6, logit_bias=((50, 2.0),), n=2),
        SamplingParams(max_tokens=24, log_probs=True),
        SamplingParams(max_tokens=24, stop_token_ids=(1, 8, 30), min_tokens=4),
    ]


@pytest.mark.parametrize(("num_blocks", "host_memory"), [(0, 0), (6, 0), (6, 1 << 20)])
def test_the_same_seed_gives_the_same_ids_alone_and_in_a_batch(
    bench: Bench, lowering: str, num_blocks: int, host_memory: int
) -> None:
    """Company, chunking, forks, preemption and swaps must not be heard in a sequence's random numbers or penalties."""
    engine = bench.engines[lowering]
    together = serve(
        engine, requests(mixed_sampling()), num_blocks=num_blocks, max_num_tokens=24, host_memory=host_memory
    )
    assert (together.stats.swaps_in > 0) == bool(host_memory)
    if num_blocks:
        assert together.stats.preemptions > 0, "this cache was meant to be too small"
    for request in requests(mixed_sampling()):
        alone = serve(engine, [request], max_num_tokens=512, prefix_cache=False)
        for handle in range(request.handle, request.handle + request.sampling.n):
            assert together.ids[handle] == alone.ids[handle], f"sequence {handle}"
            assert together.reasons[handle] == alone.reasons[handle]
            if request.sampling.log_probs:
                np.testing.assert_allclose(together.log_probs[handle], alone.log_probs[handle], atol=1e-3)
    assert len({tuple(together.ids[handle]) for handle in (10, 11, 12)}) == 3, "siblings draw their own numbers"


def test_a_replayed_sequence_continues_as_it_would_have(bench: Bench, lowering: str) -> None:
    """A restarted core gets prompt + delivered tokens; the rest must be the same text."""
    sampling = SamplingParams(temperature=1.0, seed=9, max_tokens=20, frequency_penalty=0.5)
    whole = serve(bench.engines[lowering], [Request(handle=1, prompt_ids=(5, 6, 7), sampling=sampling)]).ids[1]
    replay = Request(handle=1, prompt_ids=(5, 6, 7), sampling=sampling, output_ids=tuple(whole[:11]))
    assert serve(bench.engines[lowering], [replay]).ids[1] == whole[11:]


def test_log_probs_are_those_of_the_reference(bench: Bench, lowering: str) -> None:
    prompt = prompts()[2]
    sampling = SamplingParams(max_tokens=12, temperature=0.7, seed=3, log_probs=True)
    served = serve(bench.engines[lowering], [Request(handle=0, prompt_ids=prompt, sampling=sampling)])
    ids = served.ids[0]
    with torch.no_grad():
        logits = bench.reference(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits, -1)[range(len(ids)), ids].numpy()
    np.testing.assert_allclose(served.log_probs[0], expected, atol=1e-3)


def test_limits_of_a_loaded_engine_are_the_tightest_of_model_settings_and_cache(bench: Bench) -> None:
    engine, _ = load(bench.engines["torch"], num_blocks=6, max_num_seqs=3)
    limits = engine.runner.limits
    assert (limits.num_blocks, limits.max_num_seqs, limits.vocab_size) == (6, 3, VOCAB)
    assert limits.max_model_len == MAX_LEN and engine.capacity.num_bytes == 6 * 2 * 2 * 32 * 2 * 16 * 4
    longer = EngineConfig(scheduler=SchedulerConfig(max_model_len=100_000))
    assert load_engine(bench.engines["torch"], longer).runner.limits.max_model_len == MAX_LEN


def test_a_changed_weight_file_is_refused_by_name(bench: Bench, tmp_path: Path, lowering: str) -> None:
    engine = tmp_path / "engine"
    engine.mkdir()
    for file in bench.engines[lowering].iterdir():
        (engine / file.name).write_bytes(file.read_bytes())
    weights = engine / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ManifestMismatch, match=r"model\.safetensors"):
        load(engine)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("lowering", "says"), [("torch", "torch sees no GPU"), ("openvino", "openvino runs on CPUs")])
def test_an_engine_for_a_gpu_does_not_start_on_the_processor(bench: Bench, lowering: str, says: str) -> None:
    """The instance of a GPU that was gone answered from the processor, a hundred times slower, and nobody knew why."""
    with pytest.raises(ConfigError, match=f"gpu2: the engine cannot run on it: {says}"):
        load_engine(bench.engines[lowering], EngineConfig(), needs_gpu="gpu2")


def test_settings_that_cannot_work_are_named(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="num_threads=-1"):
        load_engine(bench.engines["torch"], EngineConfig(num_threads=-1))
    with pytest.raises(ConfigError, match="num_instances=0"):
        load_engine(bench.engines["torch"], EngineConfig(), num_instances=0)
    with pytest.raises(ConfigError, match="num_blocks=2"):
        load(bench.engines["torch"], num_blocks=2)


@pytest.mark.parametrize(
    ("files", "most"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
    ],
)
def test_a_containers_quota_bounds_the_cores(tmp_path: Path, files: dict[str, str], most: int) -> None:
    """On a 64-core host with a quota of 2, 64 compute threads fight over two."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert 1 <= num_usable_cores(tmp_path) <= most


@pytest.mark.parametrize("text", ["max 100000", ""])
def test_no_quota_leaves_all_cores(tmp_path: Path, text: str) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert num_usable_cores(tmp_path) == num_usable_cores(tmp_path / "none") >= 1
