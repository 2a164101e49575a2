"""A model in stages, each with its layers: the answers of one process, and stages that do not wait for each other."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import measure_bubbles
import numpy as np
import psutil
import pytest
import torch
from engines import MAX_LEN, VOCAB, LoadedEngine, load, make_checkpoint, make_engine, serve, serve_on
from hypothesis import given
from hypothesis import strategies as st
from thread_stages import StageCommunicator, ThreadStages

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig
from pageflight.core.errors import ConfigError
from pageflight.core.manifest import EngineManifest
from pageflight.core.plan import StepPlan
from pageflight.core.request import Request, SamplingParams
from pageflight.lowering.base import StepInputs
from pageflight.lowering.torch_lowering import TorchLowering
from pageflight.models.stages import cut_stages
from pageflight.models.weights import expected_shapes
from pageflight.runners import factory, occupancy
from pageflight.runners.micro_batches import micro_batches
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


@pytest.mark.parametrize(
    ("changes", "size", "dtype"),
    [
        ({"num_key_value_heads": 4}, 1, "int8"),
        ({"num_key_value_heads": 1, "tie_word_embeddings": True}, 2, "int4"),
        ({"head_dim": 48, "attention_bias": True}, 2, "fp32"),
        ({"head_dim": 128, "num_key_value_heads": 4}, 1, "bf16"),
        ({"mlp_bias": True}, 1, "fp8"),
    ],
)
def test_stages_of_other_heads_and_precisions_serve_what_one_serves(
    tmp_path: Path, changes: dict[str, object], size: int, dtype: str
) -> None:
    """Multi-head and multi-query attention, wide heads, biases, a tied head: what a stage passes on has the type of
    activations, and every stage the scales of its own layers."""
    make_checkpoint(tmp_path / "checkpoint", num_layers=3, **changes)
    engine = make_engine(tmp_path / "checkpoint", tmp_path / "engine", "torch", dtype=dtype)
    greedy, sampled = requests(6)[0], requests(6)[2]
    if dtype == "bf16":  # whose products depend on what else is in the step: nobody draws near a border
        sampled = replace(sampled, sampling=greedy.sampling)
    asked = [replace(each, prompt_ids=each.prompt_ids[:40]) for each in (greedy, sampled)]
    scheduler = SchedulerConfig(max_num_tokens=48, max_num_seqs=8, max_model_len=MAX_LEN)
    loaded, scheduler = stages(engine, size, 2, EngineConfig(kv=KVConfig(num_blocks=16), scheduler=scheduler))
    together = serve_on(loaded, scheduler, asked)
    loaded.runner.close()
    assert together.ids == serve(engine, asked, max_num_tokens=48).ids


def test_stages_that_are_processes_serve_what_one_serves(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of a stage, lines between stages: a sum over other ranks than those of the stage, or a hidden state that
    was overwritten before it was sent."""
    monkeypatch.setattr(occupancy, "WINDOW_S", 0.02)
    alone = serve(engine, requests(16))
    loaded, config = load(engine, tensor_parallel=2, pipeline_parallel=2)
    assert loaded.capacity.num_bytes == loaded.runner.limits.num_blocks * 2 * 4 * 32 * 2 * 16 * 4, "of all ranks"
    together = serve_on(loaded, config, requests(16))
    idle_share = loaded.runner.idle_share
    loaded.runner.close()
    assert together.ids == alone.ids and together.reasons == alone.reasons
    assert 0 < idle_share < 1
    assert not [child for child in psutil.Process().children() if "rank_worker" in " ".join(child.cmdline())]


def test_deterministic_stages_give_the_same_bits_in_any_company(engine: Path) -> None:
    """A chunk was cut at another place with somebody beside it."""
    asked = [replace(each, prompt_ids=each.prompt_ids[:50]) for each in (requests(8)[1], requests(8)[2])]
    config = EngineConfig(
        kv=KVConfig(num_blocks=32, prefix_cache=False),
        scheduler=SchedulerConfig(max_num_tokens=96, max_num_seqs=8, max_model_len=MAX_LEN, deterministic=True),
    )
    loaded, scheduler = stages(engine, 1, 2, config)
    together, alone = serve_on(loaded, scheduler, asked), serve_on(loaded, scheduler, asked[1:])
    loaded.runner.close()
    assert together.ids == serve(engine, asked, deterministic=True, prefix_cache=False).ids
    assert together.ids[20] == alone.ids[20] and together.log_probs[20] == alone.log_probs[20]


@pytest.mark.parametrize(
    ("num_stages", "message"),
    [
        (5, "pipeline_parallel=5: each stage needs a layer, num_layers=4 are here"),
        (0, "pipeline_parallel=0: must be at least 1"),
    ],
)
def test_numbers_of_stages_that_do_not_work_are_refused_before_a_process_is_started(
    engine: Path, num_stages: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    with pytest.raises(ConfigError, match=message):
        factory.load_engine(engine, EngineConfig(pipeline_parallel=num_stages))


def test_every_stage_needs_gpus_of_its_own(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second stage would have shared the first one's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(factory, "_gpu", lambda: None)
    message = "tensor_parallel=2, pipeline_parallel=2: each rank needs a GPU of its own, 3 are here"
    with pytest.raises(ConfigError, match=message):
        factory.load_engine(engine, EngineConfig(tensor_parallel=2, pipeline_parallel=2))


def test_a_lowering_without_stages_is_refused_by_name(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint")
    engine = make_engine(tmp_path / "checkpoint", tmp_path / "engine", "openvino")
    with pytest.raises(ConfigError, match="pipeline_parallel=2: only engine torch runs in stages, not openvino"):
        factory.load_engine(engine, EngineConfig(pipeline_parallel=2))


# --- micro-batches


@given(
    lengths=st.lists(st.one_of(st.just(1), st.integers(1, 150)), min_size=1, max_size=12),
    count=st.integers(1, 5),
    data=st.data(),
)
def test_micro_batches_are_the_step_in_an_order_that_keeps_every_row(
    lengths: list[int], count: int, data: st.DataObject
) -> None:
    """A token left out, or computed before those that it attends to; an id given to another row."""
    starts = data.draw(st.lists(st.integers(0, 100), min_size=len(lengths), max_size=len(lengths)))
    samples = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    rows = data.draw(st.permutations(range(len(lengths))))
    arrays = [np.array(each, np.int32) for each in (rows, starts, lengths)]
    plan = StepPlan(step=3, rows=arrays[0], starts_at=arrays[1], lengths=arrays[2], samples=np.array(samples, np.bool_))
    sampling, at = plan.rows[plan.samples], dict(zip(rows, starts, strict=True))
    batches, seen = micro_batches(plan, count, 32), []
    assert 1 <= len(batches) <= count
    for part, lines in batches:
        assert part.step == 3 and part.rows.dtype == part.starts_at.dtype == part.lengths.dtype == np.int32
        assert len(set(part.rows.tolist())) == len(part.rows), "a row runs twice in one pass"
        assert sampling[lines].tolist() == part.rows[part.samples].tolist()
        seen += lines.tolist()
        for row, start, length, samples_now in part.chunks:
            index = rows.index(row)
            assert at[row] == start and length > 0
            at[row] = start + length
            is_last = at[row] == starts[index] + lengths[index]
            assert is_last or at[row] % 32 == 0, "cut within a block"
            assert samples_now == (is_last and samples[index])
    assert at == {row: start + length for row, start, length in zip(rows, starts, lengths, strict=True)}
    assert sorted(seen) == list(range(len(sampling)))
    decoding = [int((part.lengths == 1).sum()) for part, _ in batches]
    if set(lengths) == {1}:
        assert max(decoding) - min(decoding) <= 1 and len(batches) == min(count, len(lengths))


def test_rows_that_decode_stay_in_their_micro_batch_when_a_prompt_comes_by() -> None:
    """The first part of the next step had to wait for the last one of this step: the pipeline ran empty."""
    decoding, prompt = np.arange(8, dtype=np.int32), np.array([8], np.int32)
    rows = np.append(decoding, prompt)
    lengths = np.where(rows == 8, np.int32(120), np.int32(1))
    with_prompt = StepPlan(step=0, rows=rows, starts_at=rows, lengths=lengths, samples=rows < 8)
    without = StepPlan(step=1, rows=decoding, starts_at=decoding, lengths=lengths[:8], samples=decoding >= 0)
    parts = [[each.plan for each in micro_batches(plan, 4, 32)] for plan in (with_prompt, without)]
    for one, other in zip(*parts, strict=True):
        assert set(other.rows.tolist()) == set(one.rows.tolist()) - {8}
    assert [part.num_tokens for part in parts[0]] == [26, 34, 34, 34]


# --- stages that wait


def test_a_second_step_fills_the_bubbles_of_the_first() -> None:
    """Stages stood still for three of seven parts of every step; with one part a step they always do, for three of
    four."""
    idle = {count: measure_bubbles.idle_share(4, count, ahead=True) for count in (1, 4)}
    one_at_a_time = measure_bubbles.idle_share(4, 4, ahead=False)
    assert idle[1] > 0.7 and one_at_a_time > 3 / 7
    assert idle[4] < one_at_a_time


class OnePoisoned(measure_bubbles.SleepingLayers):
    """Gives NaN for rows whose last token is 13."""

    def forward(self, inputs: StepInputs, x: torch.Tensor | None = None) -> torch.Tensor:
        if not self._is_last:
            return torch.from_numpy(inputs.ids_T.astype(np.float32))[:, None]
        assert x is not None
        logits = torch.zeros(len(inputs.take_L), measure_bubbles.VOCAB)
        logits[:, 3] = 1.0
        logits[x[inputs.take_L, 0] == 13] = np.nan
        return logits


def test_a_sequence_with_broken_logits_ends_alone_on_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stage gave its row a token that the last one had not sampled."""
    monkeypatch.setattr(measure_bubbles, "SleepingLayers", OnePoisoned)
    mailbox = measure_bubbles.served(2, 2, prompts=[(5,), (13,), (7, 13), (9,)])[1]
    events = mailbox.take_events()
    reasons = {finished.handle: finished.reason for each in events for finished in each.finished}
    assert reasons == {0: "length", 1: "error", 2: "error", 3: "length"}
    ids = [index for each in events for index in each.ids.tolist()]
    assert ids == [3] * 2 * measure_bubbles.NUM_STEPS


# --- layers of stages


@given(
    layers=st.lists(st.integers(1, 50), min_size=1, max_size=7),
    first=st.integers(0, 100),
    last=st.integers(0, 100),
    data=st.data(),
)
def test_no_other_cut_has_a_smaller_largest_stage(
    layers: list[int], first: int, last: int, data: st.DataObject
) -> None:
    """Every layer is in one stage; a large head takes layers from the last one."""
    count = data.draw(st.integers(1, len(layers)))
    stages = cut_stages(layers, first_bytes=first, last_bytes=last, num_stages=count)

    def largest(borders: tuple[int, ...]) -> int:
        parts = [layers[b:e] for b, e in zip((0, *borders), (*borders, len(layers)), strict=True)]
        sizes = [sum(part) for part in parts]
        sizes[0] += first
        sizes[-1] += last
        return max(sizes)

    assert [stage.begin for stage in stages] == [0, *(stage.end for stage in stages[:-1])]
    assert stages[-1].end == len(layers) and stages[0].is_first and stages[-1].is_last
    assert all(stage.begin < stage.end for stage in stages)
    found = largest(tuple(stage.end for stage in stages[:-1]))
    assert found == min(largest(borders) for borders in combinations(range(1, len(layers)), count - 1))


def test_a_stage_reads_its_own_weights_only(engine: Path) -> None:
    """Every stage had the whole model in its memory."""
    opened = TorchLowering().opened(engine)
    names = [set(stage.names(opened.config)) for stage in opened.stages(3)]
    assert set().union(*names) == set(expected_shapes(opened.config))
    assert sum(map(len, names)) == len(expected_shapes(opened.config)), "none is read twice"
    assert "embed" in names[0] and {"norm", "head"} <= names[2]
