"""One engine on several ranks, each a process: the answers of one, and typed errors for what is not whole."""

from __future__ import annotations

import queue
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from engines import MAX_LEN, VOCAB, load, make_checkpoint, make_engine, serve, serve_on
from thread_ranks import ThreadCommunicator, ThreadGroup

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig
from pageflight.core.errors import ConfigError, RankLost
from pageflight.core.plan import RowStart, StepPlan, StepResult
from pageflight.core.request import Request, SamplingParams
from pageflight.loop.engine_loop import Drain, EngineLoop, Submit
from pageflight.loop.in_memory import InMemoryMailbox
from pageflight.models.stages import Place
from pageflight.ranks.local_launcher import LocalLauncher
from pageflight.ranks.messages import Computed, RankSpec, digest_of
from pageflight.ranks.plan_frames import PlanDecoder, PlanEncoder
from pageflight.ranks.processes import RankProcesses
from pageflight.runners import factory
from pageflight.runners.base import RunnerLimits
from pageflight.runners.device import DeviceRunner
from pageflight.runners.device_factory import load_on_gpu
from pageflight.runners.parallel import ParallelRunner
from pageflight.sched.scheduler import Scheduler


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    make_checkpoint(folder / "checkpoint")
    return make_engine(folder / "checkpoint", folder / "engine", "torch")


def requests(max_tokens: int) -> list[Request]:
    generator = np.random.default_rng(3)
    common = {"temperature": 1.0, "log_probs": True}
    wishes = [
        SamplingParams(max_tokens=max_tokens),
        SamplingParams(**common, max_tokens=max_tokens, seed=2, top_k=20, n=3),
        SamplingParams(**common, max_tokens=max_tokens, seed=3, top_p=0.9, repetition_penalty=1.3),
        SamplingParams(**common, max_tokens=max_tokens, seed=5, min_p=0.05, bad_words_ids=((17,), (4, 9))),
        SamplingParams(max_tokens=max_tokens, logit_bias=((50, 2.0),), min_tokens=5, stop_token_ids=(1, 8, 30)),
    ]
    return [
        Request(handle=10 * number, prompt_ids=tuple(generator.integers(2, VOCAB, 21).tolist()), sampling=sampling)
        for number, sampling in enumerate(wishes)
    ]


def workers() -> list[psutil.Process]:
    """Ranks that are children of this process."""
    return [child for child in psutil.Process().children() if "rank_worker" in " ".join(child.cmdline())]


def test_a_cache_that_is_too_small_is_refused_and_nothing_is_left(engine: Path) -> None:
    """The next engine of this process could not meet its ranks: the group of the last one was still there."""
    with pytest.raises(ConfigError, match="num_blocks=2: one sequence of max_model_len=160"):
        load(engine, num_blocks=2, tensor_parallel=2)
    assert not workers()


def test_ranks_serve_what_one_serves(engine: Path) -> None:
    """Prompts in chunks, forks, preemption and swaps, every sampler: ranks that apply one difference otherwise sample
    other ids, or wait for each other for ever."""
    options = {"num_blocks": 5, "max_num_tokens": 32, "host_memory": 1 << 20}
    alone = serve(engine, requests(16), **options, ahead=True)
    loaded, config = load(engine, **options, kv_admission="optimistic", tensor_parallel=2)
    assert loaded.capacity.num_bytes == 5 * 2 * 2 * 32 * 2 * 16 * 4, "of both ranks together"
    together = serve_on(loaded, config, requests(16), ahead=True)
    assert len(workers()) == 1
    loaded.runner.close()
    assert not workers(), "ranks end with their runner"
    assert together.stats.swaps_in > 0, "this cache was meant to be too small"
    assert together.ids == alone.ids and together.reasons == alone.reasons
    for handle, log_probs in alone.log_probs.items():
        np.testing.assert_allclose(together.log_probs[handle], log_probs, atol=1e-4)


def test_four_deterministic_ranks_give_the_same_bits_in_any_company(engine: Path) -> None:
    """A sum over four ranks has an order; it must not depend on what else is in the step."""
    asked = [replace(each, prompt_ids=each.prompt_ids[:7]) for each in (requests(2)[0], requests(2)[2])]
    loaded, config = load(engine, tensor_parallel=4, deterministic=True, prefix_cache=False)
    together, alone = serve_on(loaded, config, asked), serve_on(loaded, config, asked[1:])
    loaded.runner.close()
    assert together.ids == serve(engine, asked).ids
    assert together.ids[20] == alone.ids[20] and together.log_probs[20] == alone.log_probs[20]


@pytest.mark.parametrize(
    ("size", "message"),
    [(3, r"tensor_parallel=3: must divide num_heads=4; sizes that work are 1, 2, 4"), (0, "least 1")],
)
def test_sizes_that_do_not_work_are_refused_before_a_process_is_started(
    engine: Path, size: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    with pytest.raises(ConfigError, match=message):
        factory.load_engine(engine, EngineConfig(tensor_parallel=size))


def test_a_lowering_without_ranks_is_refused_by_name(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint")
    engine = make_engine(tmp_path / "checkpoint", tmp_path / "engine", "openvino")
    with pytest.raises(
        ConfigError, match=r"tensor_parallel=2: engine openvino has no ranks: .* an instance, such as --instances"
    ):
        factory.load_engine(engine, EngineConfig(tensor_parallel=2))


def test_a_rank_that_does_not_come_up_is_no_endless_wait(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RankLost, match=r"rank 1 died \(exit status 1\)"):
        load(engine, tensor_parallel=2)


FAILING = """#!{python}
import sys
from multiprocessing.connection import Connection
from pageflight.ranks.local_launcher import LocalLauncher
from pageflight.ranks.messages import Failed, encode
line = Connection(int(sys.argv[3].partition("=")[2]))
line.recv_bytes()
line.send_bytes(encode(Failed("ConfigError", "kv_memory=1: too little here")))
"""


def test_what_keeps_a_rank_from_working_keeps_its_type_and_is_told_unasked(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A supervisor tried again and again what no other try could mend: the reason had become an exit status. And a core
    without anything to do would have learnt of it with the next request."""
    program = tmp_path / "rank"
    program.write_text(FAILING.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(ConfigError, match="kv_memory=1: too little here"):
        load(engine, tensor_parallel=2)
    place, told = Place(rank=1, tensor_parallel=2), queue.Queue()
    ranks = RankProcesses(LocalLauncher(), [place], told.put)
    ranks.tell(
        [
            RankSpec(
                engine_dir=str(engine),
                manifest_digest="",
                config=EngineConfig(),
                place=place,
                device="cpu",
                host="127.0.0.1",
                port=1,
                num_threads=1,
                num_instances=1,
            )
        ]
    )
    assert isinstance(told.get(timeout=60), ConfigError)
    ranks.dismiss(at_once=True)
    ranks.close()


class RunnersOfRanks:
    """Every rank's runner, in this process; all must bring the same."""

    def __init__(self, engine: Path, config: EngineConfig, size: int) -> None:
        self.group = ThreadGroup(size)

        def load(rank: int) -> DeviceRunner:
            communicator = ThreadCommunicator(self.group, Place(rank=rank, tensor_parallel=size))
            return load_on_gpu(engine, config, torch.device("cpu"), communicator=communicator)[0]

        self.runners = self.group.each(load, range(size))
        self.limits = self.runners[0].limits

    def submit(self, plan: StepPlan) -> None:
        self.group.each(lambda runner: runner.submit(plan), self.runners)

    def collect(self) -> StepResult:
        first, *others = self.group.each(lambda runner: runner.collect(), self.runners)
        assert {digest_of(other) for other in others} == {digest_of(first)}
        return first

    def close(self) -> None:
        self.group.each(lambda runner: runner.close(), self.runners)
        self.group.close()


def test_ranks_on_kernels_serve_what_one_serves(engine: Path) -> None:
    """The runner of GPUs, two steps deep, with its kernels in the interpreter: blocks that were laid out for the heads
    of the whole model."""
    asked = [replace(each, prompt_ids=each.prompt_ids[:4]) for each in (requests(3)[0], requests(3)[3])]
    alone = serve(engine, asked, max_num_tokens=16)
    config = EngineConfig(
        kv=KVConfig(memory_bytes=1 << 19, host_memory_bytes=1 << 17),
        scheduler=SchedulerConfig(max_num_tokens=16, max_num_seqs=8, max_model_len=MAX_LEN),
    )
    ranks = RunnersOfRanks(engine, config, 2)
    assert {len(runner._model.blocks.cache[0, 0, 0]) for runner in ranks.runners} == {1}, "one K/V head of two each"
    assert ranks.limits.num_blocks == 1 << 19 >> 14 and ranks.limits.num_host_blocks == 8
    assert served_by(ranks, config, asked) == alone.ids


def served_by(ranks: RunnersOfRanks, config: EngineConfig, asked: list[Request]) -> dict[int, list[int]]:
    """The ids of requests that run to their ends on ranks, which are closed."""
    kv = replace(config.kv, num_blocks=ranks.limits.num_blocks)
    scheduler = Scheduler(config.scheduler, kv, vocab_size=VOCAB)
    mailbox = InMemoryMailbox()
    mailbox.send(*[Submit(each) for each in asked], Drain())
    EngineLoop(scheduler=scheduler, runner=ranks, mailbox=mailbox, ahead=True).run()
    ranks.close()
    ids: dict[int, list[int]] = defaultdict(list)
    for events in mailbox.take_events():
        for handle, index in zip(events.handles.tolist(), events.ids.tolist(), strict=True):
            ids[handle].append(index)
    return ids


# --- plans on their way


def start(row: int) -> RowStart:
    sampling = SamplingParams(temperature=0.5, logit_bias=((3, 0.25),), bad_words_ids=((1, 2),), log_probs=True)
    return RowStart(row, 77 + row, 1, np.arange(9, dtype=np.int32), 4, sampling)


def test_a_plan_arrives_as_it_was_sent() -> None:
    """A field that plans got later, and that no other rank ever saw."""
    arrays = {
        item.name: np.array([3, 1, index], np.int32)
        for index, item in enumerate(fields(StepPlan))
        if item.default is None
    }
    rows = np.array([1, 0], np.int32)
    chunks = {"rows": rows, "starts_at": rows + 5, "lengths": rows + 1, "samples": rows == 0}
    sent = StepPlan(step=7, **chunks, starts=(start(0), start(1)), ended_rows=(3, 1), **arrays)
    found = PlanDecoder().plan(PlanEncoder().message(sent))
    for item in fields(StepPlan):
        ours, theirs = getattr(sent, item.name), getattr(found, item.name)
        if isinstance(ours, np.ndarray):
            assert theirs.dtype == ours.dtype and theirs.tolist() == ours.tolist()
        elif item.name != "starts":
            assert theirs == ours
    for ours, theirs in zip(sent.starts, found.starts, strict=True):
        assert theirs.token_ids.tolist() == ours.token_ids.tolist()
        assert (theirs.row, theirs.handle, theirs.num_prompt, theirs.sampling) == (
            ours.row,
            ours.handle,
            ours.num_prompt,
            ours.sampling,
        )


def test_rows_that_stay_travel_once_and_are_the_same_array() -> None:
    """A rank laid out the same rows anew in every step; and an array changed in place was taken for the one before."""
    rows, lengths = np.arange(64, dtype=np.int32), np.ones(64, np.int32)
    rows.flags.writeable = False
    encoder, decoder = PlanEncoder(), PlanDecoder()
    plans, sizes = [], []
    for step in range(3):
        lengths[5] = 1 + step
        message = encoder.message(
            StepPlan(step=step, rows=rows, starts_at=rows + step, lengths=lengths, samples=lengths == 1)
        )
        plans.append(decoder.plan(message))
        sizes.append(len(message))
    assert plans[0].rows is plans[1].rows is plans[2].rows and not plans[0].rows.flags.writeable
    assert [plan.lengths[5] for plan in plans] == [1, 2, 3]
    assert sizes[1] == sizes[2] == sizes[0] - rows.nbytes - 2


# --- what ranks say of their results


class OneStep:
    """A runner whose steps all bring the same."""

    limits = RunnerLimits(num_blocks=1, block_size=1, max_num_seqs=1, max_model_len=1, vocab_size=2)

    def __init__(self) -> None:
        self.steps: list[int] = []

    def submit(self, plan: StepPlan) -> None:
        self.steps.append(plan.step)

    def collect(self) -> StepResult:
        return result(self.steps.pop(0))

    def close(self) -> None: ...


class ToldRanks:
    """Ranks of which a test says what they say."""

    def __init__(self) -> None:
        self.said: list[tuple[int, Computed]] = []

    def send(self, message: bytes) -> None: ...

    def loss(self, wait_s: float = 0.0) -> None: ...

    def computed(self) -> Iterator[tuple[int, Computed]]:
        said, self.said = self.said, []
        yield from said


class NoGroup:
    place = Place(rank=0, tensor_parallel=3)


def result(step: int) -> StepResult:
    return StepResult(step, np.array([step], np.int32))


def plan(step: int) -> StepPlan:
    none = np.zeros(0, np.int32)
    return StepPlan(step=step, rows=none, starts_at=none, lengths=none, samples=none == 1)


def test_results_that_differ_are_a_loss_whenever_they_arrive() -> None:
    """A rank with other tokens in its rows would poison every sum from there on, in silence."""
    ranks = ToldRanks()
    runner = ParallelRunner(OneStep(), ranks, NoGroup())  # type: ignore[arg-type]
    for step in range(5):
        runner.submit(plan(step))
        if step == 1:
            ranks.said = [(1, Computed(0, digest_of(result(0)))), (2, Computed(2, digest_of(result(2))))]
        if step == 3:
            ranks.said = [(2, Computed(0, digest_of(result(0)))), (1, Computed(1, digest_of(result(1))))]
        if step == 4:
            ranks.said = [(1, Computed(2, 1))]
            with pytest.raises(RankLost, match="rank 1 has other results than rank 0 in step 2"):
                runner.collect()
            break
        assert runner.collect().step == step
