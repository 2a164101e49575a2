"""How long stages wait for each other: `python tests/runners/measure_bubbles.py` prints the table of docs/parallel.md.

The stages are the engine's own, on threads; only their layers are fakes, which sleep for as long as tokens would take.
"""

from __future__ import annotations

import gc
import time

import numpy as np
import torch
from thread_stages import StageCommunicator, ThreadStages

from pageflight.core.config import KVConfig, SchedulerConfig
from pageflight.core.request import Request, SamplingParams
from pageflight.kv.capacity import Capacity
from pageflight.loop.engine_loop import Drain, EngineLoop, Submit
from pageflight.loop.in_memory import InMemoryMailbox
from pageflight.lowering.base import StepInputs
from pageflight.runners.stage_runner import StageRunner
from pageflight.sched.scheduler import Scheduler

NUM_ROWS, NUM_LAYERS, NUM_STEPS, TOKEN_LAYER_S = 8, 8, 24, 0.0005
VOCAB, BLOCK, MAX_LEN = 16, 32, 64


class SleepingLayers:
    """A stage's layers that take time, and nothing else of this machine."""

    block_size, vocab_size, replay_rows, num_threads = BLOCK, VOCAB, 1, 1

    def __init__(self, num_layers: int, *, is_last: bool) -> None:
        self._num_layers, self._is_last = num_layers, is_last

    def forward(self, inputs: StepInputs, x: torch.Tensor | None = None) -> torch.Tensor:
        time.sleep(self._num_layers * TOKEN_LAYER_S * len(inputs.ids_T))
        return torch.zeros(len(inputs.take_L), VOCAB) if self._is_last else self.hidden(len(inputs.ids_T))

    def hidden(self, num_tokens: int) -> torch.Tensor:
        return torch.zeros(num_tokens, 1)

    def allocate(self, num_blocks: int, num_host_blocks: int = 0) -> None: ...
    def close(self) -> None: ...


def idle_share(num_stages: int, num_micro_batches: int, *, ahead: bool) -> float:
    """Of stages, from the first step to the last; `ahead`: a second step is submitted while one is under way."""
    prompts = [(n,) for n in range(NUM_ROWS)]
    return served(num_stages, num_micro_batches, prompts=prompts, ahead=ahead)[0]


def served(
    num_stages: int, num_micro_batches: int, *, prompts: list[tuple[int, ...]], ahead: bool = True
) -> tuple[float, InMemoryMailbox]:
    """The share of the time that stages waited, and what came out."""
    kv = KVConfig(num_blocks=2 * NUM_ROWS, block_size=BLOCK)

    def make(communicator: StageCommunicator) -> StageRunner:
        place = communicator.place
        layers = SleepingLayers(NUM_LAYERS // num_stages, is_last=place.stage == num_stages - 1)
        return StageRunner(
            layers,
            communicator,
            Capacity(kv=kv, num_bytes=0, max_sequence_len=MAX_LEN, reason=""),
            max_num_seqs=NUM_ROWS,
            num_micro_batches=num_micro_batches,
        )

    runner = ThreadStages(make, 1, num_stages)
    config = SchedulerConfig(max_num_tokens=64, max_num_seqs=NUM_ROWS, max_model_len=MAX_LEN)
    scheduler, mailbox = Scheduler(config, kv, vocab_size=VOCAB), InMemoryMailbox()
    sampling = SamplingParams(max_tokens=NUM_STEPS)
    asked = (Request(handle=n, prompt_ids=ids, sampling=sampling) for n, ids in enumerate(prompts))
    mailbox.send(*map(Submit, asked), Drain())
    begin_s = time.perf_counter()
    EngineLoop(scheduler=scheduler, runner=runner, mailbox=mailbox, ahead=ahead).run()
    span_s = time.perf_counter() - begin_s
    busy_s = [stage.busy_s for stage in runner.runners]
    runner.close()
    return float(1 - np.mean(busy_s) / span_s), mailbox


def main() -> None:
    gc.freeze()  # as a core does: walking through what was imported takes as long as several steps
    idle_share(2, 2, ahead=True)
    for num_stages in (2, 4):
        for count in (1, 2, 4):
            formula, alone = (num_stages - 1) / (count + num_stages - 1), idle_share(num_stages, count, ahead=False)
            ideal, ahead = max(0.0, 1 - count / num_stages), idle_share(num_stages, count, ahead=True)
            print(f"| {num_stages} | {count} | {formula:.2f} | {alone:.2f} | {ideal:.2f} | {ahead:.2f} |")


if __name__ == "__main__":
    main()
