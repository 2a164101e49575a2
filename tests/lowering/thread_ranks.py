"""Ranks of one model as threads of this process: what they compute and tell each other is what processes do.

One computes at a time, until it waits for the others: Triton's interpreter is not made for threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from pageflight.lowering.base import StepInputs
from pageflight.lowering.torch_lowering import TorchLowering, TorchModel
from pageflight.models.stages import Place

Item = TypeVar("Item")
Result = TypeVar("Result")


class ThreadGroup:
    """Where threads leave tensors for each other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.slots: list[torch.Tensor] = [torch.zeros(0)] * size
        self.barrier = threading.Barrier(size, timeout=60)
        self.num_calls = 0
        self.turn = threading.Lock()
        self._pool = ThreadPoolExecutor(size)

    def each(self, call: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """`call` with one item per rank, by a thread each."""

        def in_turn(item: Item) -> Result:
            with self.turn:
                return call(item)

        return list(self._pool.map(in_turn, items))

    def close(self) -> None:
        self._pool.shutdown()


class ThreadCommunicator:
    """One rank's line to the others of its stage."""

    def __init__(self, group: ThreadGroup, place: Place) -> None:
        self.place, self._group = place, group

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self.all_gather(x).sum(0)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        group = self._group
        group.slots[self.place.shard.rank] = x
        group.turn.release()
        if group.barrier.wait() == 0:
            group.num_calls += 1
        gathered = torch.stack(group.slots)
        group.barrier.wait()
        group.turn.acquire()
        return gathered

    def least(self, number: int) -> int:
        assert type(number) is int, "processes agree on numbers of 64 bits"
        return int(self.all_gather(torch.tensor([number])).min())

    def total(self, number: int) -> int:
        return int(self.all_gather(torch.tensor([number])).sum())


class ThreadedRanks:
    """A compiled model of several: each pass runs on all ranks of a stage, which must answer the same bits, and then on
    the next stage."""

    def __init__(
        self,
        engine_dir: Path,
        size: int,
        num_stages: int = 1,
        load_rank: Callable[[ThreadCommunicator], TorchModel] | None = None,
    ) -> None:
        """`load_rank` makes a rank of another lowering."""
        lowering, num_threads = TorchLowering(), torch.get_num_threads()
        self.stages: list[tuple[ThreadGroup, list[TorchModel]]] = []
        for stage in range(num_stages):
            self.group = group = ThreadGroup(size)

            def load(place: Place, group: ThreadGroup = group) -> TorchModel:
                communicator = ThreadCommunicator(group, place)
                if load_rank is not None:
                    return load_rank(communicator)
                return lowering.load_rank(engine_dir, communicator, num_threads=num_threads)

            ranks = range(stage * size, (stage + 1) * size)
            places = [Place(rank=rank, tensor_parallel=size, pipeline_parallel=num_stages) for rank in ranks]
            self.stages.append((group, group.each(load, places)))
        self.ranks = [rank for _, ranks in self.stages for rank in ranks]
        first = self.ranks[0]
        self.block_size, self.vocab_size = first.block_size, first.vocab_size

    def allocate(self, num_blocks: int, num_host_blocks: int = 0) -> None:
        for rank in self.ranks:
            rank.allocate(num_blocks, num_host_blocks)

    def start(self, inputs: StepInputs) -> None:
        self._inputs = inputs

    def wait(self) -> np.ndarray:
        inputs, x = self._inputs, None
        for group, ranks in self.stages:
            passed = x
            x, *others = group.each(lambda rank, passed=passed: rank.forward(inputs, passed), ranks)
            for other in others:
                assert torch.equal(other, x)
        assert x is not None
        return x.numpy()

    def copy_blocks(self, sources: np.ndarray, targets: np.ndarray) -> None:
        for rank in self.ranks:
            rank.copy_blocks(sources, targets)

    def copy_out(self, blocks: np.ndarray, slots: np.ndarray) -> None:
        for rank in self.ranks:
            rank.copy_out(blocks, slots)

    def copy_in(self, slots: np.ndarray, blocks: np.ndarray) -> None:
        for rank in self.ranks:
            rank.copy_in(slots, blocks)

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()
        for group, _ in self.stages:
            group.close()
