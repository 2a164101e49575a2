"""Cores that are recorded and checked while they serve."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

import pytest
from front_harness import CONFIG, SLOW, Collector, NumberText, Recorder, eventually, generation, run

from pageflight.core.errors import ConfigError
from pageflight.loop.address import private_address
from pageflight.loop.core_process import CoreSpec, FakeEngine, core_command
from pageflight.loop.front import Front
from pageflight.loop.local import find_python, start_core
from pageflight.loop.recorder import read_entries
from pageflight.loop.recording import Header
from pageflight.loop.replay import replay
from pageflight.loop.reports import CacheSize
from pageflight.loop.status import read_status
from pageflight.loop.supervisor import Supervisor
from pageflight.loop.watch import CHECK_VARIABLE, RECORD_VARIABLE, Watch
from pageflight.runners.base import RunnerLimits
from pageflight.runners.fake import FakeRunner

BREAKING_CORE = """
import sys
from pathlib import Path
from pageflight.loop import core_process
from pageflight.sched.scheduler import Scheduler

settle, mark = Scheduler.settle, Path(sys.argv.pop(1))

def lose_a_block(scheduler, plan, result, now_s):
    events = settle(scheduler, plan, result, now_s)
    if plan.step == 20 and not mark.exists():
        mark.touch()
        scheduler.space.pool._free[0].popitem(last=False)
    return events

Scheduler.settle = lose_a_block
sys.exit(core_process.main())
"""


def test_a_core_that_breaks_an_invariant_is_replaced_and_its_streams_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A lost block was noticed by nobody until no request could be admitted any more."""
    address, python = private_address(), find_python()
    spec = CoreSpec(config=CONFIG, fake=FakeEngine(step_s=0.002), watch=Watch(check_invariants=1))

    def command(report_fd: int, trace_fd: int, cache: CacheSize | None) -> list[str]:
        rest = core_command(python, spec, address, report_fd, trace_fd, cache)[3:]
        return [python, "-c", BREAKING_CORE, str(tmp_path / "broken"), *rest]

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    supervisor, recorder = Supervisor(command, address, environment=environment), Recorder()
    supervisor.start()
    try:
        supervisor.wait_ready(60)
        front = Front(address, NumberText(), recorder)
        front.wait_ready(60)
        with caplog.at_level(logging.ERROR):
            disturbed = run(front, generation(max_tokens=60)).ids()
        assert len(recorder.restarts) == 1 and (tmp_path / "broken").exists()
        assert disturbed == run(front, generation(max_tokens=60)).ids()
        assert "InvariantBroken: invariant broken after step 20: a free block" in caplog.text
        front.close(0)
    finally:
        supervisor.close(5)


def test_every_life_of_a_core_leaves_a_recording_that_replays(tmp_path: Path) -> None:
    """The second core wrote over the file of the first, whose death was to be understood."""
    spec = CoreSpec(config=SLOW.config, fake=SLOW.fake, instance=3, watch=Watch(record=str(tmp_path / "run.rec")))
    recorder = Recorder()
    with start_core(spec, NumberText(), recorder) as front:
        sinks = [Collector(2) for _ in range(6)]
        for index, sink in enumerate(sinks):
            front.submit(generation((index, 4), max_tokens=60, n=2, temperature=1.0, seed=index), sink)
        sinks[0].wait(lambda: sinks[0].num_ids > 20)
        eventually(lambda: any(path.stat().st_size > 2000 for path in tmp_path.iterdir()), "something is recorded")
        status = read_status(front._address.status)
        assert status is not None
        os.kill(status.core_pid, signal.SIGKILL)
        for sink in sinks:
            sink.wait()
    files = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime)
    assert len(files) == 2 and all(path.name.startswith("run.3-") for path in files)
    num_tokens = []
    for path in files:
        entries = read_entries(path)
        header = next(entries)
        assert isinstance(header, Header) and header.instance == 3
        kv, scheduler = header.config.kv, header.config.scheduler
        limits = RunnerLimits(
            num_blocks=kv.num_blocks,
            block_size=kv.block_size,
            max_num_seqs=scheduler.max_num_seqs,
            max_model_len=scheduler.max_model_len,
            vocab_size=header.vocab_size,
        )
        replayed = replay(header, entries, runner=FakeRunner(limits), check=True)
        assert replayed.difference is None
        num_tokens.append(replayed.num_tokens)
    assert all(num_tokens) and sum(num_tokens) <= 6 * 2 * 60 + 12 * 60


def test_a_recording_that_cannot_be_written_is_told_at_the_start(tmp_path: Path) -> None:
    spec = CoreSpec(config=CONFIG, fake=FakeEngine(), watch=Watch(record=str(tmp_path / "no" / "run.rec")))
    with pytest.raises(ConfigError, match=r"record=.*No such file"), start_core(spec, NumberText()):
        pass


def test_settings_travel_through_the_environment() -> None:
    for watch in (Watch(), Watch(record="/a/run.rec"), Watch(record="x", check_invariants=7)):
        assert Watch.of_environment(watch.to_environment()) == watch
    assert Watch.of_environment({CHECK_VARIABLE: "", RECORD_VARIABLE: ""}) == Watch()
    for wrong in ("yes", "-1", "1.5", "²"):
        with pytest.raises(ConfigError, match=CHECK_VARIABLE):
            Watch.of_environment({CHECK_VARIABLE: wrong})
