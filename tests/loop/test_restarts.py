"""Cores that come back other than they were, late, or not at all: what was accepted is kept all the same."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import msgspec
import pytest
from front_harness import CONFIG, SLOW, Collector, NumberText, Recorder, eventually, generation, run

from pageflight.core.errors import DeadlineExceeded, EngineLost, PromptTooLong, QueueFull, RanksMissing
from pageflight.loop import front as front_module
from pageflight.loop.address import CoreAddress, private_address
from pageflight.loop.core_process import CoreSpec, FakeEngine, core_command
from pageflight.loop.deaths import Death
from pageflight.loop.front import Front
from pageflight.loop.local import find_python, make_supervisor, start_core
from pageflight.loop.open_sequence import OpenSequence, SharedStops
from pageflight.loop.reports import CacheSize, Report
from pageflight.loop.status import read_status
from pageflight.loop.supervisor import Supervisor, SupervisorConfig
from pageflight.loop.takeover import replays

QUICK = SupervisorConfig(backoff_s=0.01)


@contextmanager
def lives(
    spec_of: Callable[[int], CoreSpec], *, keeps_cache: bool = True, config: SupervisorConfig = QUICK
) -> Iterator[tuple[Front, Recorder]]:
    """A front to cores of which each, counted from 0, is another."""
    address, python, starts = private_address(), find_python(), []

    def command(report_fd: int, trace_fd: int, cache: CacheSize | None) -> list[str]:
        starts.append(report_fd)
        spec = spec_of(len(starts) - 1)
        return core_command(python, spec, address, report_fd, trace_fd, cache if keeps_cache else None)

    supervisor, recorder = Supervisor(command, address, environment=dict(os.environ), config=config), Recorder()
    supervisor.start()
    try:
        supervisor.wait_ready(60)
        front = Front(address, NumberText(), recorder)
        front.wait_ready(60)
        yield front, recorder
        front.close(0)
    finally:
        supervisor.close(5)


def core_pid(address: CoreAddress) -> int:
    status = read_status(address.status)
    return 0 if status is None else status.core_pid


def signal_core(front: Front, number: signal.Signals = signal.SIGKILL) -> None:
    eventually(lambda: core_pid(front._address) > 0, "there is a core")
    os.kill(core_pid(front._address), number)


def begun(front: Front, count: int = 3, **wishes: object) -> list[Collector]:
    """Long streams of which each has some tokens."""
    sinks = [Collector() for _ in range(count)]
    for index, sink in enumerate(sinks):
        front.submit(generation((index, 2, 3) * 20, **{"max_tokens": 500, **wishes}), sink)  # type: ignore[arg-type]
        sink.wait(lambda sink=sink: sink.num_ids > 5)
    return sinks


NO_SETTINGS = CoreSpec(config=CONFIG)
"""Neither an engine nor a fake: a ConfigError, as when too little memory is free."""


def test_a_restart_that_lacks_something_once_is_tried_again() -> None:
    """One ConfigError while another process had the memory, and the engine was lost for ever."""
    with lives(lambda life: NO_SETTINGS if 0 < life < 7 else SLOW) as (front, _):
        (sink,) = begun(front, 1, max_tokens=200)
        signal_core(front)
        assert sink.wait().finals[0].error is None and sink.num_ids == 200


def test_what_keeps_a_core_from_coming_back_is_no_fault_of_its_requests() -> None:
    """Valid requests were answered with ConfigError: INVALID_ARG, and 400."""
    config = SupervisorConfig(backoff_s=0.01, max_killed_starts=2)
    with lives(lambda life: NO_SETTINGS if life else SLOW, config=config) as (front, _):
        sinks = begun(front)
        signal_core(front)
        errors = [sink.wait().finals[0].error for sink in sinks]
        with pytest.raises(EngineLost, match="does not start again: neither an engine directory") as refused:
            front.submit(generation(), Collector())
        assert {type(error) for error in (*errors, refused.value)} == {EngineLost}


def test_who_waits_for_ranks_in_vain_is_told_and_the_next_core_comes_all_the_same() -> None:
    """A machine was away for ten minutes. Streams waited for four starts in a row, and then nobody tried any more."""
    address, python, starts = private_address(), find_python(), []
    words = Report("failed", "rank 1 did not dial in", RanksMissing.__name__)
    absent = f"echo '{msgspec.json.encode(words).decode()}' > /proc/self/fd/"
    is_back = threading.Event()

    def command(report_fd: int, trace_fd: int, cache: CacheSize | None) -> list[str]:
        starts.append(report_fd)
        if len(starts) == 1 or is_back.is_set():
            return core_command(python, SLOW, address, report_fd, trace_fd, cache)
        return ["sh", "-c", f"{absent}{report_fd}; sleep 0.05; exit 1"]

    config = SupervisorConfig(max_backoff_s=0.01, max_failed_starts=2, max_killed_starts=2)
    supervisor = Supervisor(command, address, environment=dict(os.environ), config=config)
    supervisor.start()
    try:
        supervisor.wait_ready(60)
        front = Front(address, NumberText(), Recorder())
        front.wait_ready(60)
        (sink,) = begun(front, 1)
        signal_core(front)
        with pytest.raises(EngineLost, match="does not start again: rank 1 did not dial in"):
            raise sink.wait().finals[0].error or AssertionError("it went on")
        eventually(lambda: len(starts) > 6, "it is tried again and again")
        is_back.set()
        eventually(lambda: front.is_ready, "the ranks are back")
        assert run(front, generation(max_tokens=5)).num_ids == 5
        front.close(0)
    finally:
        supervisor.close(5)


def test_a_first_start_that_waits_for_ranks_in_vain_is_the_only_one() -> None:
    """The server did not say for minutes, four times as many as were asked for, that it could not start."""
    words = Report("failed", "rank 1 did not dial in", RanksMissing.__name__)
    line = f"echo '{msgspec.json.encode(words).decode()}' > /proc/self/fd/"
    supervisor = Supervisor(lambda fd, *_: ["sh", "-c", f"{line}{fd}; exit 1"], private_address())
    supervisor.start()
    with pytest.raises(RanksMissing, match="rank 1 did not dial in"):
        supervisor.wait_ready(60)
    assert supervisor.status.restarts == 0
    supervisor.close(0)


def test_a_front_that_had_a_core_says_engine_lost_whatever_a_new_supervisor_meets() -> None:
    address = private_address()
    first = make_supervisor(SLOW, address)
    first.start()
    front = Front(address, NumberText(), Recorder())
    front.wait_ready(60)
    (sink,) = begun(front, 1)
    first._process.kill()  # type: ignore[union-attr]
    first._closing.set()
    first._thread.join()
    second = make_supervisor(NO_SETTINGS, address)
    second.start()
    assert isinstance(sink.wait().finals[0].error, EngineLost)
    front.close(0)
    second.close(1)


def fake_of(num_blocks: int) -> CoreSpec:
    """A cache whose size is computed at each start."""
    config = replace(CONFIG, kv=replace(CONFIG.kv, num_blocks=0))
    return CoreSpec(config=config, fake=FakeEngine(step_s=0.004, num_blocks=num_blocks))


def test_a_core_that_finds_less_free_memory_gets_the_cache_of_the_first() -> None:
    """Its cache was half of what was free then, and streams that no longer fitted ended with PromptTooLong and 400."""
    with lives(lambda life: fake_of(24 if life else 256)) as (front, recorder):
        sinks = begun(front)
        signal_core(front)
        for sink in sinks:
            assert sink.wait().finals[0].error is None and sink.num_ids == 500
        assert front.limits.num_blocks == 256 and len(recorder.restarts) == 1


def test_a_stream_that_the_next_core_cannot_hold_is_told_that_the_engine_was_lost() -> None:
    """The core of another supervisor may be smaller; the request was valid when it was accepted."""
    with lives(lambda life: fake_of(24 if life else 256), keeps_cache=False) as (front, recorder):
        sinks = begun(front)
        signal_core(front)
        for sink in sinks:
            assert isinstance(sink.wait().finals[0].error, EngineLost)
        assert recorder.refusals == ["EngineLost"] * 3
        with pytest.raises(PromptTooLong):
            front.submit(generation(max_tokens=500), Collector())


def test_a_cancellation_during_the_takeover_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """It came after the front had looked for cancelled sequences and before there was a core to tell: the next core
    ran the sequence to its end."""
    with start_core(SLOW, NumberText(), recorder := Recorder(), supervision=QUICK) as front:
        sink = Collector()
        number = front.submit(generation(max_tokens=900), sink)
        sink.wait(lambda: sink.num_ids > 3)
        read_deaths = front_module.read_deaths

        def cancel_meanwhile(path: object) -> dict[int, Death]:
            front.cancel(number)
            return read_deaths(path)  # type: ignore[arg-type]

        monkeypatch.setattr(front_module, "read_deaths", cancel_meanwhile)
        signal_core(front)
        assert sink.wait().finals[0].finish_reason == "cancelled"
        assert sink.num_ids < 300 and not front.num_open
        eventually(lambda: bool(recorder.restarts), "another core takes over")


LATE = CoreSpec(config=CONFIG, fake=FakeEngine(step_s=0.004, start_s=4.0))


def test_a_deadline_holds_while_there_is_no_core() -> None:
    """200 ms were answered after 6 s, when the next core was there to look at them."""
    with lives(lambda life: LATE if life else SLOW) as (front, _):
        sinks = begun(front, timeout_ms=2000)
        signal_core(front)
        eventually(lambda: not front.is_ready, "the front notices")
        sink, asked_s = Collector(), time.monotonic()
        front.submit(generation(timeout_ms=200), sink)
        assert isinstance(sink.wait().finals[0].error, DeadlineExceeded)
        assert time.monotonic() - asked_s < 1.5
        for stream in sinks:
            assert stream.wait().finals[0].finish_reason == "deadline" and stream.num_ids
        assert core_pid(front._address) == 0 or not front.is_ready


def test_a_deadline_holds_while_the_core_hangs() -> None:
    """A request with a deadline of 200 ms waited for `hang_limit_s`, and for the next core."""
    with start_core(SLOW, NumberText(), supervision=SupervisorConfig(hang_limit_s=30)) as front:
        signal_core(front, signal.SIGSTOP)
        sink, asked_s = Collector(), time.monotonic()
        front.submit(generation(timeout_ms=200), sink)
        assert sink.wait().finals[0].finish_reason == "deadline"
        assert time.monotonic() - asked_s < 4.0 and not front.num_open
        signal_core(front, signal.SIGCONT)
        assert len(run(front, generation()).ids()) == 30


NARROW = replace(CONFIG, scheduler=replace(CONFIG.scheduler, max_num_seqs=4, max_queue_size=4))


def test_the_queue_has_its_limit_while_there_is_no_core() -> None:
    """500 requests were accepted by a server that could queue four, and all were then taken over past its limit."""
    specs = [CoreSpec(config=NARROW, fake=FakeEngine(step_s=0.004, start_s=start_s)) for start_s in (0.0, 2.0)]
    with lives(lambda life: specs[min(life, 1)]) as (front, recorder):
        begun(front, 4, max_tokens=200)
        sinks = [Collector() for _ in range(20)]
        signal_core(front)
        eventually(lambda: not front.is_ready, "the front notices")
        refused = 0
        for sink in sinks:
            try:
                front.submit(generation(max_tokens=5), sink)
            except QueueFull as error:
                refused += 1
                assert error.limit == 4
        assert refused == 16, "four are open, eight may be"
        assert recorder.refusals == ["QueueFull"] * 16
        eventually(lambda: not front.num_open, "what was accepted is served")
        assert sum(sink.num_ids == 5 for sink in sinks) == 4


def test_what_no_core_has_taken_in_meets_the_limits_of_the_next() -> None:
    """Whatever was open went to the next core as if another had accepted it."""
    wanted = generation(n=2)
    group = [
        OpenSequence(wanted, Collector(), SharedStops.of(wanted), NumberText(), leader=4, index=index)
        for index in range(2)
    ]
    assert [(request.handle, request.sampling.n, request.is_taken_over) for request, _ in replays([group])] == [
        (4, 2, False)
    ]
    group[1].output_ids.append(7)
    assert [(request.handle, request.sampling.n, request.is_taken_over) for request, _ in replays([group])] == [
        (4, 1, False),
        (5, 1, True),
    ]
    group[0].is_accepted = True
    assert all(request.is_taken_over for request, _ in replays([group]))
    group[0].ending = "cancelled"
    assert [request.handle for request, _ in replays([group])] == [5]


def test_requests_of_an_outage_go_to_the_next_core_whole() -> None:
    """One request for four answers became four requests, of which some could be refused and others not."""
    with lives(lambda life: SLOW) as (front, _):
        signal_core(front)
        eventually(lambda: not front.is_ready, "the front notices")
        sink = Collector(4)
        front.submit(generation(n=4, temperature=1.0, seed=3), sink)
        (group,) = front._book.groups.values()
        sink.wait()
        assert not any(sequence.alone for sequence in group)
        assert len({sink.ids(index) for index in range(4)}) == 4


def test_what_a_core_has_taken_in_is_known_as_accepted() -> None:
    with start_core(CoreSpec(config=NARROW, fake=FakeEngine(step_s=0.02)), NumberText()) as front:
        for _ in range(8):
            front.submit(generation(max_tokens=200), Collector())
        sequences = list(front._book.open.values())
        eventually(lambda: all(s.is_accepted for s in sequences), "those that wait are told of as well")


def test_signals_to_a_whole_control_group_do_not_drain_the_core() -> None:
    """systemd sends SIGTERM to every process of a service: the core refused requests of a server that still took them
    and that decides itself when it is drained. Ctrl-C reaches a whole terminal in the same way."""
    with start_core(SLOW, NumberText()) as front:
        before = core_pid(front._address)
        (sink,) = begun(front, 1, max_tokens=100)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal_core(front, number)
        assert len(run(front, generation()).ids()) == 30
        assert len(sink.wait().ids()) == 100 and core_pid(front._address) == before


def test_a_core_that_hangs_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counted as ready for a minute, and a balancer sent it everything."""
    monkeypatch.setattr("pageflight.loop.core_link.SILENT_AFTER_S", 1.0)
    with start_core(SLOW, NumberText(), supervision=SupervisorConfig(hang_limit_s=60)) as front:
        time.sleep(2.0)
        assert front.is_ready, "an idle core shows life"
        signal_core(front, signal.SIGSTOP)
        eventually(lambda: not front.is_ready, "the front notices")
        signal_core(front, signal.SIGCONT)
        eventually(lambda: front.is_ready, "the core shows life again")


def test_steps_that_are_always_long_are_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """A core speaks only between steps, and on a small machine a large prompt takes long: readiness flapped."""
    monkeypatch.setattr("pageflight.loop.core_link.SILENT_AFTER_S", 0.6)
    with start_core(CoreSpec(config=CONFIG, fake=FakeEngine(step_s=1.0)), NumberText()) as front:
        run(front, generation(max_tokens=1))
        sink, seen = Collector(), set()
        front.submit(generation(max_tokens=4), sink)
        until_s = time.monotonic() + 3.0
        while time.monotonic() < until_s:
            seen.add(front.is_ready)
            time.sleep(0.02)
        assert seen == {True}


def test_a_core_keeps_the_size_of_its_cache_in_its_command() -> None:
    cache = CacheSize(num_blocks=77, max_sequence_len=513)
    (line,) = [item for item in core_command("python", fake_of(5), private_address(), 3, 4, cache) if "--spec" in item]
    spec = msgspec.json.decode(line.removeprefix("--spec="), type=CoreSpec)
    assert spec.config.kv.num_blocks == 77 and spec.config.scheduler.max_model_len == 513
