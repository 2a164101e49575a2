"""A device that has not the memory for a step, or for its blocks: an allocator that fails, in the interpreter."""

from __future__ import annotations

import gc
import logging
import sys
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import make_checkpoint, make_engine
from torch.utils._python_dispatch import TorchDispatchMode

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig
from pageflight.core.errors import OutOfMemory
from pageflight.core.plan import RowStart, StepPlan
from pageflight.core.request import SamplingParams
from pageflight.kv.capacity import FreeMemory
from pageflight.lowering.device_blocks import DeviceBlocks
from pageflight.lowering.device_model import KernelModel
from pageflight.lowering.engine_dir import open_engine
from pageflight.runners import device_factory
from pageflight.runners.base import SparingRunner
from pageflight.runners.device import DeviceRunner
from pageflight.runners.device_wishes import wishes_bytes

MAX_LEN = 64


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    make_checkpoint(folder / "checkpoint")
    return make_engine(folder / "checkpoint", folder / "engine", "torch", MAX_LEN)


class FailingAllocator(TorchDispatchMode):
    """Counts what allocates; the calls numbered from `first` on, `count` of them, do not find their memory."""

    def __init__(self, first: int = 1 << 30, count: int = 1) -> None:
        super().__init__()
        self.num_calls, self._failing = 0, range(first, first + count)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        allocates = not schema.is_mutable and not any(result.alias_info for result in schema.returns)
        if allocates and schema.returns and "Tensor" in str(schema.returns[0].type) and not _is_interpreter():
            self.num_calls += 1
            if self.num_calls - 1 in self._failing:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand a page of advice")
        return func(*args, **(kwargs or {}))


def _is_interpreter() -> bool:
    """Whether Triton's interpreter asks, which copies what a kernel gets; a GPU has that in its own memory."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.endswith("triton/runtime/interpreter.py"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def runner_of(engine_dir: Path, *, is_alone: bool = True) -> DeviceRunner:
    model = KernelModel.load(open_engine(engine_dir, "torch"), torch.device("cpu"))
    sizes = {"num_blocks": 6, "num_host_blocks": 3, "max_num_seqs": 2, "max_num_tokens": 40, "max_model_len": MAX_LEN}
    return DeviceRunner(model, **sizes, is_alone=is_alone)


def plans() -> Iterator[StepPlan]:
    """A prompt; a second one beside it, with copies to the host and back; then both decode."""
    greedy = SamplingParams(frequency_penalty=1.5, presence_penalty=0.5, logit_bias=((7, 2.0),), max_tokens=9)
    drawn = SamplingParams(temperature=1.0, repetition_penalty=1.6, bad_words_ids=((5,), (6, 7)), max_tokens=9)
    prompts = [np.arange(3, 12, dtype=np.int32), np.arange(20, 25, dtype=np.int32)]
    starts = [RowStart(row, row, 0, prompts[row], len(prompts[row]), (greedy, drawn)[row]) for row in range(2)]

    def of(step: int, chunks: list[tuple[int, int, int]], **changes: Any) -> StepPlan:
        rows, begins, lengths = np.array(chunks, np.int32).T
        return StepPlan(
            step=step, rows=rows, starts_at=begins, lengths=lengths, samples=np.ones(len(rows), np.bool_), **changes
        )

    def table(row: int, block: int) -> dict[str, np.ndarray]:
        named = zip(("table_rows", "table_columns", "table_blocks"), (row, 0, block), strict=True)
        return {name: np.array([value], np.int32) for name, value in named}

    yield of(0, [(0, 0, 9)], starts=(starts[0],), **table(0, 4))
    moves = {"copy_out_blocks": [4], "copy_out_slots": [1], "copy_in_slots": [1], "copy_in_blocks": [2]}
    moves |= {"copy_sources": [2], "copy_targets": [5]}
    copies = {name: np.array(ids, np.int32) for name, ids in moves.items()}
    changes = {name: np.array(ids, np.int32) for name, ids in {"table_rows": [0, 1], "table_blocks": [5, 1]}.items()}
    yield of(1, [(0, 9, 1), (1, 0, 5)], starts=(starts[1],), table_columns=np.zeros(2, np.int32), **copies, **changes)
    for step in range(2, 5):
        yield of(step, [(0, 8 + step, 1), (1, 3 + step, 1)])


def answers(engine_dir: Path, places: dict[int, int]) -> tuple[list[list[int]], dict[int, int], DeviceRunner]:
    """Ids of every step; in those of `places` one call does not find its memory. And how many calls there were."""
    runner, found, num_calls = runner_of(engine_dir), [], {}
    for plan in plans():
        with FailingAllocator(places.get(plan.step, 1 << 30)) as allocator:
            runner.submit(plan)
        num_calls[plan.step] = allocator.num_calls
        found.append(runner.collect().sampled_ids.tolist())
    return found, num_calls, runner


def test_a_step_that_runs_again_has_happened_once(engine_dir: Path) -> None:
    """Wherever memory ends: penalties count a token once, copies of blocks read what was there before."""
    expected, num_calls, runner = answers(engine_dir, {})
    assert runner.num_shortages == 0 and min(num_calls.values()) > 20, "the test must know what allocates"
    shares = [(0.0, 0.99, 0.97), (0.2, 0.3, 0.99)]
    for share in shares:
        places = {step: int(share[step - 1] * num_calls[step]) for step in (1, 2, 3)}
        found, _, runner = answers(engine_dir, places)
        assert found == expected, places
        assert runner.num_shortages == 3, places


def test_a_step_that_finds_no_memory_at_all_ends_the_core_with_a_typed_error(
    engine_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """torch's error has a page of advice about its allocator; whoever restarts the core looks for ours."""
    runner = runner_of(engine_dir)
    caplog.set_level(logging.WARNING, "pageflight.runners.device")
    with FailingAllocator(5, 1 << 20), pytest.raises(OutOfMemory, match=r"Tried to allocate 2\.00 GiB\.$"):
        runner.submit(next(plans()))
    assert "captured graphs and cached memory are given up, the step runs again" in caplog.text
    assert isinstance(runner, SparingRunner) and runner.num_shortages == 1


def test_one_of_several_ranks_repeats_nothing(engine_dir: Path) -> None:
    """The others had the first half of its pass and waited for a sum that the second beginning is not."""
    runner = runner_of(engine_dir, is_alone=False)
    with FailingAllocator(5, 1), pytest.raises(OutOfMemory, match="did not find its memory"):
        runner.submit(next(plans()))
    assert runner.num_shortages == 0


def test_other_errors_are_not_tried_again(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal address nothing that the device says can be believed."""
    runner = runner_of(engine_dir)
    calls: list[object] = []

    def fail(inputs: object) -> None:
        calls.append(inputs)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(runner._model, "forward", fail)
    with pytest.raises(RuntimeError, match="illegal"):
        runner.submit(next(plans()))
    assert len(calls) == 1


def load(engine_dir: Path, num_blocks: int) -> tuple[DeviceRunner, Any]:
    config = EngineConfig(
        kv=KVConfig(num_blocks=num_blocks),
        scheduler=SchedulerConfig(max_num_tokens=40, max_num_seqs=4, max_model_len=MAX_LEN),
    )
    return device_factory.load_on_gpu(engine_dir, config, torch.device("cpu"))


def test_blocks_that_do_not_fit_become_fewer(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another process took memory between measuring and allocating: the engine did not start at all."""
    allocate, limit = DeviceBlocks.allocate, 34

    def only_some(self: DeviceBlocks, num_blocks: int, num_host_blocks: int = 0) -> None:
        if num_blocks > limit:
            raise OutOfMemory(f"{num_blocks} blocks: CUDA out of memory")
        allocate(self, num_blocks, num_host_blocks)

    monkeypatch.setattr(DeviceBlocks, "allocate", only_some)
    caplog.set_level(logging.WARNING, "pageflight.runners.device_factory")
    runner, capacity = load(engine_dir, 40)
    assert runner.limits.num_blocks == capacity.kv.num_blocks == 32, "40, 36, 32"
    assert "36 blocks, for 40 did not fit" in capacity.reason and "36 blocks do not fit, trying 32" in caplog.text
    runner.close()
    limit = 1
    with pytest.raises(OutOfMemory, match="not even 22 of 40 blocks fit: 22 blocks: CUDA out of memory"):
        load(engine_dir, 40)


def test_sequences_get_as_short_as_what_is_left(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was admitted for blocks that are not there would wait for ever."""
    allocate = DeviceBlocks.allocate

    def all_but_one(self: DeviceBlocks, num_blocks: int, num_host_blocks: int = 0) -> None:
        if num_blocks > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        allocate(self, num_blocks, num_host_blocks)

    monkeypatch.setattr(DeviceBlocks, "allocate", all_but_one)
    runner, capacity = load(engine_dir, 2)
    assert capacity.max_sequence_len == runner.limits.max_model_len == 33
    runner.close()


@pytest.mark.parametrize(
    ("by_others", "own", "share", "num_instances", "expected"),
    [
        (0, 20, 0.9, 1, 70 - 5),  # alone
        (45, 20, 0.45, 1, 25 - 5),  # beside another instance that has its half
        (45, 20, 0.9, 2, 25 - 5),  # the same where nobody said which GPU is whose
        (60, 20, 0.45, 1, 20 - 5),  # others have more than theirs: what is left
        (45, 50, 0.45, 1, 0),
    ],
)
def test_a_part_of_a_gpu_is_this_instances_own(
    monkeypatch: pytest.MonkeyPatch, by_others: int, own: int, share: float, num_instances: int, expected: int
) -> None:
    """What the first of two instances had taken was counted against the second one, which got no block; or what was
    left of all that both may have was halved, as if the weights of one were those of both."""
    gib, total = 1 << 30, 100
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((total - by_others - own) * gib, total * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: own * gib)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    config = EngineConfig(kv=KVConfig(gpu_memory_utilization=share))
    free = device_factory._free(device, config, 4 * gib, num_instances)
    assert free is not None and abs(free.num_bytes - expected * gib) <= gib // 1000


def test_instances_divide_a_gpu_once(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each had a quarter of what two were to share; and rows of many long sequences were nobody's memory."""
    asked: list[tuple[int, int]] = []

    def free(device: torch.device, config: EngineConfig, pass_bytes: int, num_instances: int) -> FreeMemory:
        asked.append((pass_bytes, num_instances))
        return FreeMemory(num_bytes=10 * 2 * 2 * 2 * 32 * 16 * 4, source="a card")

    monkeypatch.setattr(device_factory, "_free", free)
    scheduler = SchedulerConfig(max_num_tokens=40, max_num_seqs=30, max_model_len=MAX_LEN)
    loaded = partial(device_factory.load_on_gpu, engine_dir, EngineConfig(scheduler=scheduler), torch.device("cpu"))
    runner, capacity = loaded(num_instances=2)
    assert capacity.kv.num_blocks == 10, capacity.reason
    assert asked == [(wishes_bytes(30, 199) + 4 * 30 * (MAX_LEN + 2), 2)]
    assert runner._rows.state.nbytes >= 4 * 30 * (MAX_LEN + 2)
    runner.close()


def test_a_runner_that_lacks_memory_is_gone_before_the_next_one(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows and scores lay beside those of the next one, which lacked just that."""
    made: list[weakref.ref[DeviceRunner]] = []

    class Runner(DeviceRunner):
        def __init__(self, model: KernelModel, **settings: Any) -> None:
            assert all(runner() is None for runner in made)
            made.append(weakref.ref(self))
            model.device = torch.device("cpu")
            super().__init__(model, **settings)
            model.device = torch.device("cuda")  # a runner is warmed up there

        def warm_up(self, max_num_tokens: int) -> None:
            if len(made) < 3:
                raise OutOfMemory("one step more than there is")

    monkeypatch.setattr(device_factory, "DeviceRunner", Runner)
    gc.disable()
    try:
        runner, capacity = load(engine_dir, 40)
    finally:
        gc.enable()
    assert len(made) == 3 and capacity.kv.num_blocks == 32
    runner.close()
