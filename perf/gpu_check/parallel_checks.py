"""A model on several cards against one card: the same plans, a process for each card, NCCL between them."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig
from pageflight.core.manifest import EngineManifest, FileRecord
from pageflight.core.plan import StepPlan, StepResult
from pageflight.core.request import Request, SamplingParams
from pageflight.lowering.torch_lowering import TorchLowering
from pageflight.models.config import DecoderConfig
from pageflight.models.stages import Place
from pageflight.quant.forms import weight_forms
from pageflight.quant.store import WEIGHTS_NAME
from pageflight.ranks.local_launcher import LOOPBACK
from pageflight.ranks.messages import digest_of
from pageflight.ranks.process_group import open_store
from pageflight.runners import device_factory
from perf.gpu_check import tensorrt_ranks
from perf.gpu_check.card import Card, Record, attempted, failure
from perf.gpu_check.engine_checks import GRAPH_REQUESTS, Driven, PlanRunner, drive, make_scheduler
from perf.gpu_check.models import SHAPES
from perf.gpu_check.parallel_rank import ENOUGH, Collect, Failed, FromRank, Measure, ToRank, serve
from perf.gpu_check.tensorrt_models import SMALL, RandomTensors

LAYOUTS = ((2, 1), (1, 2), (2, 2))
"""Ranks of a stage, and stages."""
LIMIT = 1e-3
"""Largest difference of log probabilities in float32: sums over ranks have another order."""
PATIENCE_S = 240.0
MAX_LEN, MAX_TOKENS = 96, 64
TOKEN_COUNTS, ROUNDS = (1, 32, 256, 2048), 50
"""Tokens of the messages that are timed, and how often."""


class Ranks:
    """Processes that run the same plans; all must bring the same."""

    def __init__(self, card: Card, folder: Path, config: EngineConfig, size: int, num_stages: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._store, port = open_store(LOOPBACK)
        self._lines, self._processes = [], []
        for rank in range(size * num_stages):
            place = Place(rank=rank, tensor_parallel=size, pipeline_parallel=num_stages)
            ours, theirs = context.Pipe()
            arguments = (place, port, card.is_gpu, folder, config, theirs)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._lines.append(ours)
            self._processes.append(process)
        try:
            self.limits: Any = self._answers()[0]
        except BaseException:
            self.close()
            raise

    def submit(self, plan: StepPlan) -> None:
        self._tell(plan)

    def collect(self) -> StepResult:
        self._tell(Collect())
        results: list[StepResult] = self._answers()
        if len({digest_of(result) for result in results}) > 1:
            raise AssertionError("ranks have other results than each other")
        return results[0]

    def measured(self, token_counts: Sequence[int], rounds: int) -> Record:
        """Of the first rank."""
        self._tell(Measure(tuple(token_counts), rounds))
        first: Record = self._answers()[0]
        return first

    def close(self) -> None:
        for line in self._lines:
            with suppress(OSError):  # it is gone
                line.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()
            process.join()

    def _tell(self, message: ToRank) -> None:
        for line in self._lines:
            line.send(message)

    def _answers(self) -> list[Any]:
        """Of every rank; the first that has failed says why the others do not come."""
        found: list[FromRank] = []
        for rank, line in enumerate(self._lines):
            if not line.poll(PATIENCE_S):
                raise TimeoutError(f"rank {rank} has said nothing for {PATIENCE_S:g} s")
            answer = line.recv()
            if isinstance(answer, Failed):
                raise RuntimeError(answer.message)
            found.append(answer)
        return found


def parallel(card: Card, folder: Path, layouts: Sequence[tuple[int, int]] = LAYOUTS) -> Iterator[Record]:
    """Ids and log probabilities of several cards against those of one, then what their messages take; then the same of
    TensorRT's engines of two ranks, the one card having our kernels."""
    num_cards = torch.cuda.device_count() if card.is_gpu else max(size * stages for size, stages in layouts)
    if num_cards < 2:
        yield {"name": "parallel", "skipped": f"{num_cards} card"}
        return
    model = replace(SMALL, num_layers=4) if card.is_gpu else SHAPES["tiny"]
    write_engine(folder / "engine", model)
    config = EngineConfig(
        kv=KVConfig(num_blocks=48, prefix_cache=False),
        scheduler=SchedulerConfig(max_num_tokens=MAX_TOKENS, max_num_seqs=8, max_model_len=MAX_LEN),
    )
    with patch.object(device_factory, "free_memory", lambda: ENOUGH):
        runner, _ = device_factory.load_on_gpu(folder / "engine", config, card.device)
    alone = _served(card, runner)
    runner.close()
    yield {"name": "one card", "tokens": sum(map(len, alone.ids.values())), "seconds": round(alone.seconds, 3)}
    for size, stages in layouts:
        name = f"tensor parallel {size}, {stages} stage{'s' if stages > 1 else ''}"
        if size * stages > num_cards:
            yield {"name": name, "skipped": f"{num_cards} cards"}
            continue
        yield attempted(name, partial(_compared, name, card, folder / "engine", config, alone, size, stages))

    def compare(name: str, engine: Path) -> Record:
        return _compared(name, card, engine, config, alone, tensorrt_ranks.SIZE, 1)

    yield from tensorrt_ranks.ranks_of_tensorrt(card, folder, model, MAX_TOKENS, compare)


def _compared(
    name: str, card: Card, folder: Path, config: EngineConfig, alone: Driven, size: int, num_stages: int
) -> Record:
    with closing(Ranks(card, folder, config, size, num_stages)) as ranks:
        together = _served(card, ranks)
        counts, rounds = (TOKEN_COUNTS, ROUNDS) if card.is_gpu else ((1,), 2)
        times = ranks.measured(counts, rounds)
    differences = [
        abs(ours - theirs)
        for handle, log_probs in alone.log_probs.items()
        for ours, theirs in zip(log_probs, together.log_probs[handle], strict=False)
    ]
    is_same = together.ids == alone.ids
    return {
        "name": name,
        "tokens": sum(map(len, together.ids.values())),
        "seconds": round(together.seconds, 3),
        "log_prob_error": max(differences),
        **times,
        **failure("other ids than on one card", unless=is_same),
        **(failure("other log probabilities", unless=max(differences) <= LIMIT) if is_same else {}),
    }


def _served(card: Card, runner: PlanRunner) -> Driven:
    """Requests with wishes of every kind, in chunks, for long enough that decode steps are captured; the second time
    none is made any more."""
    for _ in range(2 if card.is_gpu else 1):
        scheduler = make_scheduler(runner, max_num_tokens=MAX_TOKENS)
        for handle, wishes in enumerate(GRAPH_REQUESTS if card.is_gpu else GRAPH_REQUESTS[:2]):
            num_prompt, growth = (17 + 9 * handle, 4) if card.is_gpu else (5 + 4 * handle, 1)
            sampling = SamplingParams(max_tokens=3 + growth * handle, seed=handle, log_probs=True, **wishes)
            prompt = tuple(range(2 + handle, 2 + handle + num_prompt))
            scheduler.submit(Request(handle=handle, prompt_ids=prompt, sampling=sampling), 0.0)
        run = drive(scheduler, runner)
    return run


def write_engine(folder: Path, config: DecoderConfig) -> None:
    """A float32 engine of the torch lowering, as `pageflight build` would make it, of random weights."""
    folder.mkdir()
    RandomTensors(weight_forms(config, "fp32")).save(folder / WEIGHTS_NAME)
    data = (folder / WEIGHTS_NAME).read_bytes()
    EngineManifest(
        name="random",
        family=config.family,
        lowering="torch",
        dtype="fp32",
        kv_dtype="fp32",
        block_size=TorchLowering.block_size,
        max_model_len=MAX_LEN,
        vocab_size=config.vocab_size,
        model=config.to_json(),
        fingerprint=TorchLowering().fingerprint("fp32"),
        files=(FileRecord(path=WEIGHTS_NAME, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()),),
    ).write(folder)
