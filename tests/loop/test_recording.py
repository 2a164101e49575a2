"""Recordings: what is in the file, that a replay is the same run, and that it notices when it is not."""

from __future__ import annotations

import inspect
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig, SchedulingPolicy
from pageflight.core.errors import ConfigError
from pageflight.core.plan import RowStart, StepEvents, StepPlan, StepResult
from pageflight.core.request import Request, SamplingParams
from pageflight.core.tenants import Tenants, TenantShare
from pageflight.loop import recorder as recorder_module
from pageflight.loop.clock import ManualClock
from pageflight.loop.engine_loop import Cancel, Drain, EngineLoop, Submit
from pageflight.loop.in_memory import InMemoryMailbox
from pageflight.loop.recorder import Recorder, read_entries, recording_path
from pageflight.loop.recording import (
    Called,
    Died,
    Entry,
    Header,
    PlanDecoder,
    PlanEncoder,
    Planned,
    Settled,
    rest_of,
)
from pageflight.loop.replay import Replayed, replay
from pageflight.loop.watched_scheduler import InvariantBroken, WatchedScheduler
from pageflight.runners.base import RunnerLimits
from pageflight.runners.fake import FakeRunner
from pageflight.sched.scheduler import Scheduler

VOCAB_SIZE = 13
CONFIG = EngineConfig(
    scheduler=SchedulerConfig(
        max_num_tokens=12, max_num_seqs=5, max_model_len=48, max_queue_size=6, kv_admission="optimistic"
    ),
    kv=KVConfig(block_size=2, num_blocks=24),
)
LIMITS = RunnerLimits(
    num_blocks=CONFIG.kv.num_blocks,
    block_size=CONFIG.kv.block_size,
    max_num_seqs=CONFIG.scheduler.max_num_seqs,
    max_model_len=CONFIG.scheduler.max_model_len,
    vocab_size=VOCAB_SIZE,
)
READING = {"stats", "check", "space", "num_waiting", "has_work", "next_deadline_s", "accused", "handles"}
"""What looks at a scheduler without changing what it will decide."""


def header(config: EngineConfig = CONFIG) -> Header:
    return Header(config=config, vocab_size=VOCAB_SIZE)


def record_busy_run(path: Path, policy: SchedulingPolicy, *, seed: int = 3, num_turns: int = 400) -> Scheduler:
    """Cancels, deadlines, forks, sequences taken over, refusals, and a cache too small for them all."""
    config = replace(CONFIG, scheduler=replace(CONFIG.scheduler, scheduling_policy=policy))
    recorder = Recorder(path, header(config))
    scheduler = WatchedScheduler(config.scheduler, config.kv, vocab_size=VOCAB_SIZE, recorder=recorder, check_every=1)
    mailbox, clock, chance = InMemoryMailbox(), ManualClock(), random.Random(seed)
    loop = EngineLoop(scheduler=scheduler, runner=FakeRunner(LIMITS), mailbox=mailbox, clock=clock)
    next_handle = 0
    for turn in range(num_turns):
        clock.advance(0.01)
        if turn == num_turns // 2:
            scheduler.set_tenants(Tenants(by_name={"a": TenantShare(weight=4.0, max_running=2)}))
        if chance.random() < 0.5:
            sampling = SamplingParams(
                max_tokens=chance.randrange(0, 20),
                n=chance.choice((1, 1, 2, 3)),
                temperature=chance.choice((0.0, 1.0)),
                stop_token_ids=chance.choice(((), (4,), (1, 2, 3, 5, 6, 7))),
                log_probs=chance.random() < 0.3,
            )
            taken_over = sampling.n == 1 and sampling.max_tokens > 3 and chance.random() < 0.2
            request = Request(
                handle=next_handle,
                prompt_ids=(1, 2, 3, 4, 5, 6)[: chance.randrange(7)] + tuple(chance.choices(range(13), k=5)),
                sampling=sampling,
                arrival_s=clock(),
                deadline_s=clock() + chance.random() if chance.random() < 0.2 else None,
                priority=chance.choice((0, 0, 1)),
                tenant=chance.choice(("", "a")),
                output_ids=(8, 9) if taken_over else (),
            )
            next_handle += sampling.n
            mailbox.send(Submit(request))
        if chance.random() < 0.1:
            mailbox.send(Cancel(max(0, next_handle - chance.randrange(8)), by_client=turn % 2 == 0))
        if scheduler.has_work or mailbox.has_commands:
            loop.step()
    mailbox.send(Drain())
    loop.run()
    recorder.close()
    return scheduler


@pytest.fixture(scope="module", params=get_args(SchedulingPolicy))
def busy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "busy.rec"
    stats = record_busy_run(path, request.param).stats()
    assert stats.preemptions > 5 and stats.cancellations > 5 and stats.cached_tokens > 5, "the run is not busy enough"
    assert stats.refusals.keys() >= {"queue_full", "invalid_argument"} and stats.recomputed_tokens > 5
    return path


def replayed(path: Path, **options: Any) -> Replayed:
    entries = read_entries(path)
    first = next(entries)
    assert isinstance(first, Header)
    return replay(first, entries, **options)


def test_a_recorded_run_replays_bit_for_bit(busy: Path) -> None:
    """A set in the scheduler, walked through in an order that changes from process to process, planned differently."""
    result = replayed(busy, check=True)
    assert result.difference is None
    assert result.num_steps > 150 and result.num_refused > 5 and result.num_requests > 80


def test_a_replay_computes_the_ids_again(busy: Path) -> None:
    assert replayed(busy, runner=FakeRunner(LIMITS)).difference is None


def changed(path: Path, change: Callable[[list[Entry]], None]) -> Replayed:
    entries = list(read_entries(path))
    change(entries)
    assert isinstance(entries[0], Header)
    return replay(entries[0], entries[1:], runner=FakeRunner(LIMITS))


def test_a_changed_id_is_found_at_its_step_and_row(busy: Path) -> None:
    """Ids from another model or another machine are the commonest difference."""
    steps: list[int] = []

    def change(entries: list[Entry]) -> None:
        settled = [index for index, entry in enumerate(entries) if isinstance(entry, Settled)]
        step = next(step for step in range(100, 400) if len(entries[settled[step]].ids) >= 6)  # type: ignore[union-attr]
        entry = entries[settled[step]]
        assert isinstance(entry, Settled)
        ids = np.frombuffer(entry.ids, np.uint16).copy()
        ids[2] += 1
        entries[settled[step]] = msgspec.structs.replace(entry, ids=ids.tobytes())
        steps.append(step)

    difference = changed(busy, change).difference
    assert difference is not None and difference.field == "sampled_ids" and difference.row >= 0
    assert difference.recorded == difference.replayed + 1  # type: ignore[operator]
    assert difference.step == steps[0]
    assert f"step {difference.step}, row {difference.row}: sampled_ids was" in str(difference)


def test_a_changed_plan_is_found_at_its_step_field_and_entry(busy: Path) -> None:
    at: list[int] = []

    def change(entries: list[Entry]) -> None:
        index = next(
            i for i, e in enumerate(entries) if isinstance(e, Planned) and e.step > 60 and "table_blocks" in e.rest
        )
        entry = entries[index]
        assert isinstance(entry, Planned)
        blocks = np.frombuffer(entry.rest["table_blocks"], np.int32)
        entry.rest["table_blocks"] = (blocks + 1).tobytes()
        at.append(entry.step)

    difference = changed(busy, change).difference
    assert difference is not None and (difference.step, difference.field) == (at[0], "table_blocks")


@pytest.mark.parametrize(
    ("setting", "value"), [("max_num_tokens", 11), ("max_num_seqs", 4), ("token_tile", 3), ("max_queue_size", 5)]
)
def test_another_setting_of_the_scheduler_is_found(busy: Path, setting: str, value: int) -> None:
    """The reason to replay: does the changed scheduler still decide as the old one did?"""

    def change(entries: list[Entry]) -> None:
        first = entries[0]
        assert isinstance(first, Header)
        scheduler = msgspec.structs.replace(first, config=_with(first.config, setting, value))
        entries[0] = scheduler

    assert changed(busy, change).difference is not None


def _with(config: EngineConfig, setting: str, value: int) -> EngineConfig:
    return replace(config, scheduler=replace(config.scheduler, **{setting: value}))


def test_a_changed_constant_of_the_code_is_found(busy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pageflight.sched.rows.Rows.num_growing", lambda rows: 0)
    difference = replayed(busy).difference
    assert difference is not None and difference.step > 0


def test_a_killed_core_leaves_all_but_the_last_moment(busy: Path, tmp_path: Path) -> None:
    """The file of a killed core ended in the middle of a frame, and nothing of it could be read."""
    data = busy.read_bytes()
    whole = list(read_entries(busy))
    cut = tmp_path / "cut.rec"
    for keep in (len(data) - 1, len(data) - 7, 40, len(recorder_module.MAGIC) + 3):
        cut.write_bytes(data[:keep])
        entries = list(read_entries(cut))
        assert len(entries) < len(whole)


def test_damage_in_the_middle_is_an_error(busy: Path, tmp_path: Path) -> None:
    data = bytearray(busy.read_bytes())
    data[len(data) // 2] ^= 1
    damaged = tmp_path / "damaged.rec"
    damaged.write_bytes(data)
    with pytest.raises(ConfigError, match="damaged"):
        list(read_entries(damaged))
    damaged.write_bytes(b"something else")
    with pytest.raises(ConfigError, match="no recording"):
        list(read_entries(damaged))


def test_what_was_added_is_in_the_file_soon_without_closing(tmp_path: Path) -> None:
    """A recorder that writes at its end only is of no use for the run that was killed."""
    recorder = Recorder(tmp_path / "x.rec", header())
    recorder.add(Died("nothing"))
    until_s = time.monotonic() + 30
    while Died("nothing") not in list(read_entries(tmp_path / "x.rec")):
        assert time.monotonic() < until_s
    recorder.close()


def test_a_full_disk_ends_the_recording_and_not_the_core(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(tmp_path / "x.rec", header())

    recorder._file.close()
    recorder._file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
    recorder.add(Died("lost"))
    recorder.close()
    assert "No space left" in caplog.text and len(list(read_entries(tmp_path / "x.rec"))) == 1


def test_what_cannot_be_written_down_ends_the_recording_and_is_not_hoarded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The writing thread ended in silence, and everything that came after waited for it in memory."""
    recorder = Recorder(tmp_path / "x.rec", header())
    recorder.add(Called("set_tenants", {"number": 10**20}))
    until_s = time.monotonic() + 30
    while "ends here" not in caplog.text:
        assert time.monotonic() < until_s
    recorder.add(Died("lost"))
    assert not recorder._pending
    recorder.close()
    assert len(list(read_entries(tmp_path / "x.rec"))) == 1


def test_a_disk_that_is_full_from_the_first_byte_on_ends_no_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was a restarted core that could not write, and with it the restart failed."""
    full = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    monkeypatch.setattr(Path, "open", lambda *_, **__: full)
    recorder = Recorder(tmp_path / "x.rec", header())
    recorder.add(Died("lost"))
    recorder.close()
    assert "No space left" in caplog.text


def test_a_recording_never_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.rec"
    path.write_text("precious")
    with pytest.raises(ConfigError, match=r"record=.*x\.rec: File exists"):
        Recorder(path, header())
    with pytest.raises(ConfigError, match="No such file"):
        Recorder(tmp_path / "nowhere" / "x.rec", header())


def test_every_core_has_a_file_of_its_own() -> None:
    one, other = recording_path(Path("a/run.rec"), 0), recording_path(Path("a/run.rec"), 1)
    assert one != other and one.parent == Path("a") and one.suffix == ".rec" and one.name.startswith("run.0-")


def test_every_call_that_changes_a_scheduler_is_recorded() -> None:
    """A new way to influence the scheduler that is not recorded makes every replay go another way."""
    public = {name for name in dir(Scheduler) if not name.startswith("_")}
    recorded = {name for name in vars(WatchedScheduler) if not name.startswith("_")}
    assert public - READING == recorded
    for name in recorded:
        ours, theirs = inspect.signature(getattr(WatchedScheduler, name)), inspect.signature(getattr(Scheduler, name))
        assert ours == theirs, name


def test_plans_come_out_of_the_file_as_they_went_in() -> None:
    """Positions are kept as differences between plans, so every way from one plan to the next has to be met."""
    chance = random.Random(1)
    encoder, decoder = PlanEncoder(), PlanDecoder()
    rows = [0, 2, 5]
    for step in range(200):
        if chance.random() < 0.3:
            rows = chance.sample(range(8), chance.randrange(0, 6))
        lengths = [1 if chance.random() < 0.8 else 4 for _ in rows]
        plan = StepPlan(
            step,
            np.array(rows, np.int32),
            np.array([chance.randrange(3) for _ in rows], np.int32),
            np.array(lengths, np.int32),
            np.array([length == 1 for length in lengths], np.bool_),
            ended_rows=(7,) if step % 9 == 0 else (),
            table_rows=np.array([1], np.int32) if step % 7 == 0 else None,
        )
        entry = encoder.entry(0.0, plan)
        back = decoder.plan(msgspec.msgpack.decode(msgspec.msgpack.encode(entry), type=Planned))
        assert back is not None and back.step == step
        for name in ("rows", "starts_at", "lengths", "samples"):
            assert np.array_equal(getattr(back, name), getattr(plan, name)), (step, name)
        assert sorted(back.rest) == sorted(rest_of(plan))


def test_a_start_with_other_tokens_or_wishes_is_another_start() -> None:
    """Their digest stands for them in the recording."""
    none = np.zeros(0, np.int32)

    def rest(tokens: list[int], sampling: SamplingParams) -> object:
        start = RowStart(0, 1, 0, np.array(tokens, np.int32), 2, sampling)
        return rest_of(StepPlan(0, none, none, none, np.zeros(0, np.bool_), starts=(start,)))

    same = rest([1, 2], SamplingParams())
    assert same == rest([1, 2], SamplingParams())
    assert same != rest([1, 3], SamplingParams()) and same != rest([1, 2], SamplingParams(seed=1))


def test_a_broken_invariant_is_found_at_its_step(tmp_path: Path) -> None:
    """A block that was lost at step 5 showed when the cache ran out, hours later."""
    recorder = Recorder(tmp_path / "x.rec", header())
    scheduler = WatchedScheduler(CONFIG.scheduler, CONFIG.kv, vocab_size=VOCAB_SIZE, recorder=recorder, check_every=2)
    runner = FakeRunner(LIMITS)
    scheduler.submit(Request(handle=0, prompt_ids=(1, 2), sampling=SamplingParams(max_tokens=20)), 0.0)

    def step() -> StepEvents:
        plan = scheduler.plan(0.0)
        assert plan is not None
        runner.submit(plan)
        return scheduler.settle(plan, runner.collect(), 0.0)

    for _ in range(5):
        step()
    scheduler.space.pool._free[0].popitem(last=False)
    step()
    with pytest.raises(InvariantBroken, match=r"invariant broken after step 6: .*block"):
        step()
    recorder.close()
    result = replayed(tmp_path / "x.rec")
    assert result.difference is None and result.num_steps == 7


def test_errors_inside_the_scheduler_are_part_of_the_run(tmp_path: Path) -> None:
    """The step in which a scheduler fails is the one that a replay is wanted for."""
    recorder = Recorder(tmp_path / "x.rec", header())
    scheduler = WatchedScheduler(CONFIG.scheduler, CONFIG.kv, vocab_size=VOCAB_SIZE, recorder=recorder)
    scheduler.submit(Request(handle=0, prompt_ids=(1, 2), sampling=SamplingParams(max_tokens=20)), 0.0)
    scheduler._batch.finish = None  # type: ignore[assignment, method-assign]
    with pytest.raises(TypeError):
        scheduler.cancel(0)
    recorder.close()
    entries = list(read_entries(tmp_path / "x.rec"))
    assert isinstance(entries[-1], Called) and entries[-1].raised.startswith("TypeError")
    difference = replayed(tmp_path / "x.rec").difference
    assert difference is not None and difference.field == "error of cancel" and difference.replayed == ""


def test_a_decode_step_takes_little_more_than_its_ids(tmp_path: Path) -> None:
    """64 sequences: 128 bytes of ids in each step, where the plan and its result are more than 1,000."""
    path, chance = tmp_path / "x.rec", np.random.default_rng(1)
    config = SchedulerConfig(max_num_tokens=256, max_num_seqs=64, max_model_len=400)
    recorder = Recorder(path, header())
    scheduler = WatchedScheduler(
        config, KVConfig(block_size=16, num_blocks=2000), vocab_size=1 << 14, recorder=recorder
    )
    for handle in range(64):
        scheduler.submit(Request(handle=handle, prompt_ids=(1, 2), sampling=SamplingParams(max_tokens=300)), 0.0)
    for step in range(256):
        plan = scheduler.plan(step / 7)
        assert plan is not None
        ids = chance.integers(0, 1 << 14, int(plan.samples.sum()), dtype=np.int32)
        scheduler.settle(plan, StepResult(plan.step, ids), step / 7)
    recorder.close()
    assert path.stat().st_size < 256 * 400
