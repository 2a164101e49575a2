"""No stage waits for ever: sends that wait for their receivers, and hosts that wait for all that they have begun."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

import pytest
import torch
from device_stages import InTurn
from engines import LoadedEngine, serve_on
from thread_ranks import ThreadGroup
from torch.nn.functional import one_hot

from pageflight.core.config import KVConfig, SchedulerConfig
from pageflight.core.plan import StepPlan, StepResult
from pageflight.core.request import Request, SamplingParams
from pageflight.kv.capacity import Capacity
from pageflight.lowering.device_blocks import DeviceBlocks, DeviceInputs
from pageflight.lowering.device_model import DeviceModel
from pageflight.models.config import DecoderConfig
from pageflight.models.stages import Place, Stage
from pageflight.runners.device_stage import DeviceStageRunner

CONFIG = DecoderConfig(
    family="llama", vocab_size=50, hidden_size=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16,
    intermediate_size=16, max_positions=64, rms_norm_eps=1e-5,
)  # fmt: skip
BLOCK_SIZE, MAX_LEN, PATIENCE_S = 16, 48, 30.0


class CountingStage(DeviceModel):
    """The next id is the last one and one."""

    activations = torch.float32  # type: ignore[assignment]

    def forward(self, inputs: DeviceInputs) -> torch.Tensor:
        x = inputs.ids_T[:, None].expand(-1, 16).float() if inputs.hidden_TH is None else inputs.hidden_TH
        if not self.stage.is_last:
            return x + 0
        x = x if inputs.take_L is None else x[inputs.take_L]
        return one_hot((x[:, 0].long() + 1) % CONFIG.vocab_size, CONFIG.vocab_size).float()


class Meeting(threading.Barrier):
    """A message that is handed over only where both are there."""

    def __init__(self) -> None:
        super().__init__(2, timeout=PATIENCE_S)
        self.message = torch.zeros(0)


class StrictLine:
    """A rank's line: what it does in a group happens in order on a thread of that group, and a send is over when it is
    received, as NCCL may have it."""

    def __init__(self, place: Place, meetings: dict[tuple[str, int, int], SimpleQueue[Meeting]]) -> None:
        self.place, self._meetings = place, meetings
        self._groups = {name: ThreadPoolExecutor(1) for name in ("passing", "announcing")}
        self._begun: list[Future[object]] = []

    def pass_on(self, x: torch.Tensor) -> None:
        self._begin("passing", self._send, "passing", self.place.rank + 1, x)

    def take_over(self, x: torch.Tensor) -> object:
        return self._begin("passing", self._receive, "passing", self.place.rank - 1, x).result(PATIENCE_S)

    def announce(self, results: torch.Tensor) -> None:
        for rank in range(self.place.rank):
            self._begin("announcing", self._send, "announcing", rank, results)

    def expect(self, results: torch.Tensor) -> Callable[[], object]:
        last = self.place.num_ranks - 1
        begun = self._begin("announcing", self._receive, "announcing", last, results)
        return lambda: begun.result(PATIENCE_S)

    def synchronize(self) -> None:
        """Wait for everything that was begun: as a host does where a graph is captured."""
        while self._begun:
            self._begun.pop().result(PATIENCE_S)

    def _begin(self, group: str, call: Callable[..., object], *arguments: object) -> Future[object]:
        self._begun.append(self._groups[group].submit(call, *arguments))
        return self._begun[-1]

    def _send(self, group: str, to: int, x: torch.Tensor) -> None:
        meeting = self._meetings[group, self.place.rank, to].get(timeout=PATIENCE_S)  # a receiver is there
        meeting.message = x
        meeting.wait()

    def _receive(self, group: str, sender: int, x: torch.Tensor) -> torch.Tensor:
        meeting = Meeting()
        self._meetings[group, sender, self.place.rank].put(meeting)
        meeting.wait()
        return x.copy_(meeting.message)


class StrictStages:
    """Runners of all stages, whose hosts do every step side by side and stop for everything after passes of choice."""

    def __init__(self, num_stages: int, stops: Callable[[int, int], bool]) -> None:
        self._ranks = ThreadGroup(num_stages)
        ranks = range(num_stages)
        meetings: dict[tuple[str, int, int], SimpleQueue[Meeting]] = {
            (group, one, other): SimpleQueue()
            for group in ("passing", "announcing")
            for one in ranks
            for other in ranks
        }

        def make(rank: int) -> DeviceStageRunner:
            line = InTurn(StrictLine(Place(rank=rank, pipeline_parallel=num_stages), meetings), self._ranks.turn)  # type: ignore[arg-type]
            stage = Stage(begin=rank, end=rank + 1, num_layers=num_stages)
            blocks = DeviceBlocks(CONFIG, "fp32", BLOCK_SIZE, torch.device("cpu"))
            sizes = {"num_blocks": 40, "max_num_seqs": 8, "max_num_tokens": 40, "max_model_len": MAX_LEN}
            runner = DeviceStageRunner(
                CountingStage(CONFIG, blocks, stage), line, num_micro_batches=num_stages, **sizes
            )
            timed, count = runner._clock.timed, iter(range(1 << 30))

            def stopping(begin: Callable[[], torch.Tensor]) -> torch.Tensor:
                out = timed(begin)
                if stops(rank, next(count)):
                    line.synchronize()
                return out

            runner._clock.timed = stopping  # type: ignore[method-assign]
            return runner

        self.runners = self._ranks.each(make, ranks)
        self.limits = self.runners[0].limits

    def submit(self, plan: StepPlan) -> None:
        self._ranks.each(lambda runner: runner.submit(plan), self.runners)

    def collect(self) -> StepResult:
        return self._ranks.each(lambda runner: runner.collect(), self.runners)[0]


@pytest.mark.parametrize("stops", ["never", "always", "in turn"])
def test_no_stage_waits_for_another_that_waits_for_it(stops: str) -> None:
    """Ids of rows that had ended were asked for at the end of a step: the last stage waited with them for a host that
    waited for it, where both were capturing a graph."""
    rules = {"never": lambda rank, count: False, "always": lambda rank, count: True}
    stages = StrictStages(3, rules.get(stops, lambda rank, count: (rank + count) % 3 == 0))
    requests = [
        Request(handle=number, prompt_ids=(number,) * (1 + 5 * number), sampling=SamplingParams(max_tokens=6 - number))
        for number in range(5)
    ]
    scheduler = SchedulerConfig(max_num_tokens=24, max_num_seqs=8, max_model_len=MAX_LEN)
    kv = KVConfig(num_blocks=40, block_size=BLOCK_SIZE)
    capacity = Capacity(kv=kv, num_bytes=0, max_sequence_len=MAX_LEN, reason="")
    loaded = LoadedEngine(runner=stages, manifest=None, capacity=capacity, num_threads=1)  # type: ignore[arg-type]
    found = serve_on(loaded, scheduler, requests, ahead=True)
    assert found.ids == {number: list(range(number + 1, 7)) for number in range(5)}
