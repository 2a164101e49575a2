"""Ranks of TensorRT engines under the runner of GPUs: their networks walked, our kernels interpreted between them."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx as trt
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # for perf, which is not installed

from engines import MAX_LEN, make_checkpoint, make_engine, serve
from perf.gpu_check.network_walk import Walk, WalkedSegments
from test_tensor_parallel import RunnersOfRanks, requests, served_by
from thread_ranks import ThreadCommunicator, ThreadGroup

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig
from pageflight.core.errors import ConfigError, ManifestMismatch
from pageflight.core.manifest import FileRecord
from pageflight.lowering import tensorrt_model
from pageflight.lowering.communicator import Communicator
from pageflight.lowering.device_model import KernelModel
from pageflight.lowering.engine_dir import EngineDir, open_engine
from pageflight.lowering.tensorrt_build import build_engines, lower, rank_part
from pageflight.lowering.tensorrt_model import SegmentModel
from pageflight.lowering.tensorrt_plan import EnginePlan
from pageflight.lowering.tensorrt_target import TensorRtTarget
from pageflight.models.stages import Place
from pageflight.runners.factory import load_engine

SIZE = 2
CONFIG = EngineConfig(
    kv=KVConfig(memory_bytes=1 << 19, host_memory_bytes=1 << 17),
    scheduler=SchedulerConfig(max_num_tokens=16, max_num_seqs=8, max_model_len=MAX_LEN),
)


def make_ranked(checkpoint: Path, folder: Path, collectives: str) -> Path:
    """As `pageflight build --engine tensorrt --tensor-parallel 2` would make it."""
    make_engine(checkpoint, folder, "tensorrt")
    engine = open_engine(folder, "tensorrt")
    target = TensorRtTarget(
        compute_capabilities=(89,), max_num_seqs=8, max_num_tokens=16, tensor_parallel=SIZE, collectives=collectives
    )
    build_engines(
        folder,
        engine.config,
        engine.weights,
        target,
        activations="fp32",
        num_positions=MAX_LEN,
        input_unit=1,
        advance=lambda done, total: None,
    )
    files = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"):
        data = path.read_bytes()
        name = path.relative_to(folder).as_posix()
        files.append(FileRecord(path=name, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
    replace(engine.manifest, tensor_parallel=SIZE, files=tuple(files)).write(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "checkpoint"
    make_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Path:
    return make_engine(checkpoint, checkpoint.parent / "torch", "torch")


@pytest.fixture(scope="module")
def between(checkpoint: Path) -> Path:
    return make_ranked(checkpoint, checkpoint.parent / "between", "between")


@pytest.fixture(scope="module")
def inside(checkpoint: Path) -> Path:
    return make_ranked(checkpoint, checkpoint.parent / "inside", "inside")


class Stand(WalkedSegments):
    """Engines of one rank, as far as a processor has them. Sums inside them are those of `join`."""

    def __init__(self, engine: EngineDir, plan: EnginePlan, rank: int, refusal: str) -> None:
        target = TensorRtTarget(tensor_parallel=SIZE, collectives=plan.collectives)
        tensors, config, joint = rank_part(engine.weights, engine.config, rank, 1, target)
        made = lower(
            trt, config, tensors.forms, activations="fp32", num_positions=engine.manifest.max_model_len, joint=joint
        )
        self._made, self._refusal, self._sums = made, refusal, None
        walks = {name: Walk(trt, each, all_reduce=self._summed) for name, each in made.segments.items()}
        super().__init__(walks, {segment.name: segment for segment in plan.segments})

    def _summed(self, x: torch.Tensor) -> torch.Tensor:
        assert self._sums is not None, "a context without its communicator"
        return self._sums(x)

    def try_contexts(self) -> None:
        if self._refusal == "contexts":
            raise RuntimeError("no context for SM90")

    def join(self, sums: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._sums = sums

    def run(self, *arguments: Any) -> None:
        if self._refusal == "run":
            raise RuntimeError("no kernels for SM90")
        super().run(*arguments)


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Puts walked networks in the place of engines; `refusal` is what goes wrong on the last rank. Returns the ranks
    that have met."""

    def put(refusal: str = "") -> list[int]:
        ranks = iter(range(SIZE))  # one thread loads at a time
        met: list[int] = []

        def engines(engine: EngineDir, folder: Path, plan: EnginePlan, device: torch.device) -> Stand:
            rank = next(ranks)
            if refusal == "load" and rank == SIZE - 1:
                raise ConfigError("mid.engine: rtx TensorRT does not take it on Some GPU")
            return Stand(engine, plan, rank, refusal if rank == SIZE - 1 else "")

        def join(communicator: Communicator, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
            met.append(communicator.place.rank)
            return communicator.all_reduce

        monkeypatch.setattr(tensorrt_model, "_engines", engines)
        monkeypatch.setattr(tensorrt_model, "join_ranks", join)
        return met

    return put


@pytest.mark.parametrize("collectives", ["between", "inside"])
def test_ranks_on_segments_serve_what_one_serves(
    reference: Path, collectives: str, request: pytest.FixtureRequest, stand: Callable[..., list[int]]
) -> None:
    """Blocks laid out for the heads of the whole model, one rank's weights on all, a step without rows that sample
    whose last sums some ranks left out."""
    met = stand()
    asked = [replace(requests(2)[3], prompt_ids=requests(2)[3].prompt_ids[: 18 if collectives == "between" else 3])]
    ranks = RunnersOfRanks(request.getfixturevalue(collectives), CONFIG, SIZE)
    assert all(isinstance(runner._model, SegmentModel) for runner in ranks.runners)
    assert {len(runner._model.blocks.cache[0, 0, 0]) for runner in ranks.runners} == {1}, "one K/V head of two each"
    assert sorted(met) == ([0, 1] if collectives == "inside" else [])
    assert served_by(ranks, CONFIG, asked) == serve(reference, asked, max_num_tokens=16).ids


@pytest.mark.parametrize("refusal", ["load", "run", "contexts"])
def test_where_one_rank_cannot_run_its_engines_none_does(
    between: Path,
    inside: Path,
    refusal: str,
    stand: Callable[..., list[int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One rank on our kernels and another on TensorRT: they wait for each other's sums in other places, for ever. And
    what waits for all ranks must not be begun before all can."""
    met = stand(refusal)
    caplog.set_level(logging.WARNING, "pageflight.runners.device_factory")
    ranks = RunnersOfRanks(inside if refusal == "contexts" else between, CONFIG, SIZE)
    assert all(isinstance(runner._model, KernelModel) for runner in ranks.runners) and not met
    ranks.close()
    assert "cannot run it on another rank; it runs on kernels of our own instead" in caplog.text
    assert ("Some GPU; it runs" if refusal == "load" else "SM90; it runs") in caplog.text


def test_engines_for_another_number_of_ranks_are_refused(between: Path) -> None:
    """Rank 3 of four read the parts of rank 1 of two."""
    with pytest.raises(ManifestMismatch, match=r"built for tensor_parallel=2, .* is to run with 4 and 1; build"):
        load_engine(between, EngineConfig(tensor_parallel=4))
    group = ThreadGroup(1)
    communicator = ThreadCommunicator(group, Place(rank=0, tensor_parallel=4))
    engine = open_engine(between, "tensorrt", SIZE)
    with pytest.raises(ManifestMismatch, match="its segments are those of 2 ranks, not of 4"):
        tensorrt_model.load_segments(engine, between, torch.device("cpu"), communicator=communicator)
    with pytest.raises(ManifestMismatch, match="built for tensor_parallel=2"):
        open_engine(between, "tensorrt")


def test_without_a_gpu_ranks_of_tensorrt_are_refused_before_a_process_is_started(
    between: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    with pytest.raises(ConfigError, match="engine tensorrt needs an NVIDIA GPU"):
        load_engine(between, EngineConfig(tensor_parallel=SIZE))
    with pytest.raises(ConfigError, match="pipeline_parallel=2: only engine torch runs in stages, not tensorrt"):
        load_engine(between, EngineConfig(pipeline_parallel=2))
