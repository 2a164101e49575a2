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
from pageflight.models.sharding import Shard

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
    """One rank's line to the others of its group."""

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self.shard = Shard(rank=rank, size=group.size)
        self._group = group

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self.all_gather(x).sum(0)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        group = self._group
        group.slots[self.shard.rank] = x
        group.turn.release()
        if group.barrier.wait() == 0:
            group.num_calls += 1
        gathered = torch.stack(group.slots)
        group.barrier.wait()
        group.turn.acquire()
        return gathered

    def least(self, number: int) -> int:
        return int(self.all_gather(torch.tensor([number])).min())


class ThreadedRanks:
    """A compiled model of several: each pass runs on all of them, and all must answer the same bits."""

    def __init__(self, engine_dir: Path, size: int) -> None:
        self.group = ThreadGroup(size)
        lowering, num_threads = TorchLowering(), torch.get_num_threads()

        def load(rank: int) -> TorchModel:
            communicator = ThreadCommunicator(self.group, rank)
            return lowering.load_shard(engine_dir, communicator, num_threads=num_threads)

        self.ranks = self.group.each(load, range(size))
        first = self.ranks[0]
        self.block_size, self.vocab_size, self.num_threads = first.block_size, first.vocab_size, first.num_threads
        self.token_tile, self.replay_rows = first.token_tile, first.replay_rows
        self.kv_bytes_per_block = first.kv_bytes_per_block

    def allocate(self, num_blocks: int, num_host_blocks: int = 0) -> None:
        for rank in self.ranks:
            rank.allocate(num_blocks, num_host_blocks)

    def start(self, inputs: StepInputs) -> None:
        for rank in self.ranks:
            rank.start(inputs)

    def wait(self) -> np.ndarray:
        first, *others = self.group.each(lambda rank: rank.wait(), self.ranks)
        for other in others:
            np.testing.assert_array_equal(other, first)
        return first

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
        self.group.close()
