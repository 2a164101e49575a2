"""Deaths: of cores, of fronts, of the process that started a core."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from front_harness import (
    CONFIG,
    SLOW,
    Collector,
    NumberText,
    Recorder,
    eventually,
    generation,
    is_all_free,
    run,
)

from pageflight.core.errors import Cancelled, ConfigError, EngineLost, ManifestMismatch
from pageflight.loop.address import CoreAddress, private_address
from pageflight.loop.core_process import CoreSpec, FakeEngine, core_command
from pageflight.loop.front import Front
from pageflight.loop.local import find_python, make_supervisor, start_core
from pageflight.loop.reports import CacheSize, Report, Reporter
from pageflight.loop.status import read_status
from pageflight.loop.supervisor import Supervisor, SupervisorConfig


@contextmanager
def supervised(supervisor: Supervisor, address: CoreAddress, recorder: Recorder) -> Iterator[Front]:
    supervisor.start()
    try:
        supervisor.wait_ready(60)
        front = Front(address, NumberText(), recorder)
        front.wait_ready(60)
        try:
            yield front
        finally:
            front.close(0)
    finally:
        supervisor.close(5)


def core_pid(address: CoreAddress) -> int:
    """0 while there is no core. As the target of a signal that is the whole process group: see `kill_core`."""
    status = read_status(address.status)
    assert status is not None
    return status.core_pid


def kill_core(address: CoreAddress, number: signal.Signals = signal.SIGKILL) -> None:
    """Signal the core, once it is known which process that is."""
    eventually(lambda: core_pid(address) > 0, "there is a core")
    os.kill(core_pid(address), number)


def test_a_killed_core_is_a_pause_and_nothing_else() -> None:
    """No token lost, doubled or changed: the next core goes on from what was delivered, at the same positions."""
    wishes = [
        generation(
            (index, 2, 3), max_tokens=150, n=1 + index % 3, temperature=1.0, seed=index, log_probs=index % 2 == 0
        )
        for index in range(8)
    ]
    recorder = Recorder()
    with start_core(SLOW, NumberText(), recorder) as front:
        undisturbed = [Collector(wanted.sampling.n) for wanted in wishes]
        for wanted, sink in zip(wishes, undisturbed, strict=True):
            front.submit(wanted, sink)
        for sink in undisturbed:
            sink.wait()
        sinks = [Collector(wanted.sampling.n) for wanted in wishes]
        for wanted, sink in zip(wishes, sinks, strict=True):
            front.submit(wanted, sink)
        chance = random.Random(5)
        for kills in range(3):
            reached = 100 + 300 * kills + chance.randrange(200)
            sinks[-1].wait(lambda least=reached: sum(sink.num_ids for sink in sinks) >= least)
            kill_core(front._address)
            eventually(lambda least=kills: len(recorder.restarts) > least, "another core takes over")
        for calm, sink, wanted in zip(undisturbed, sinks, wishes, strict=True):
            sink.wait()
            for index in range(wanted.sampling.n):
                assert sink.ids(index) == calm.ids(index)
                assert sink.text(index) == calm.text(index)
                assert sink.finals[index].finish_reason == calm.finals[index].finish_reason
        log_probs = [[p for event in s.events for p in event.log_probs] for s in (undisturbed[0], sinks[0])]
        assert log_probs[0] == log_probs[1]
    assert [num_restarts for num_restarts, _ in recorder.restarts] == [1, 1, 1]
    assert all(num_replayed > 0 for _, num_replayed in recorder.restarts)


def test_requests_that_come_while_there_is_no_core_wait_for_the_next() -> None:
    with start_core(SLOW, NumberText()) as front:
        expected = run(front, generation()).ids()
        kill_core(front._address)
        eventually(lambda: not front.is_ready, "the front notices")
        sink, unwanted = Collector(), Collector()
        front.submit(generation(), sink)
        front.cancel(front.submit(generation((1, 1)), unwanted))
        assert sink.wait().ids() == expected
        assert isinstance(unwanted.wait().finals[0].error, Cancelled) and not unwanted.ids()


def test_a_core_that_hangs_is_replaced() -> None:
    """A stopped process keeps its sockets open, so nobody but the heartbeat notices."""
    address = private_address()
    supervisor = make_supervisor(SLOW, address, config=SupervisorConfig(hang_limit_s=3.0))
    recorder = Recorder()
    with supervised(supervisor, address, recorder) as front:
        expected = run(front, generation(max_tokens=100)).ids()
        sink = Collector()
        front.submit(generation(max_tokens=100), sink)
        sink.wait(lambda: sink.num_ids > 10)
        kill_core(address, signal.SIGSTOP)
        assert sink.wait().ids() == expected
        assert len(recorder.restarts) == supervisor.status.restarts >= 1


def test_a_core_killed_while_it_starts_is_started_again() -> None:
    """Four kills in a row before it was ready, by an impatient operator, and it was given up for ever."""
    spec = CoreSpec(config=CONFIG, fake=FakeEngine(step_s=0.004, start_s=0.3))
    with start_core(spec, NumberText()) as front:
        expected = run(front, generation(max_tokens=100)).ids()
        sink = Collector()
        front.submit(generation(max_tokens=100), sink)
        sink.wait(lambda: sink.num_ids > 10)
        pids: list[int] = []

        def kill_next() -> bool:
            pid = core_pid(front._address)
            if pid and pid not in pids:
                pids.append(pid)
                os.kill(pid, signal.SIGKILL)
            return len(pids) == 5

        eventually(kill_next, "five cores, four of them before they were ready")
        assert sink.wait().ids() == expected


def test_a_supervisor_stopped_beside_its_core_does_not_blame_the_core() -> None:
    """It woke up, saw that the time was over, and killed a healthy core without looking into the pipe."""
    code = SUPERVISOR.replace("SupervisorConfig()", "SupervisorConfig(hang_limit_s=1.5)")
    address = private_address()
    with subprocess.Popen(supervisor_command(code, address), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(2.5)  # longer than the limit
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.5)
        assert is_running(pid) and core_pid(address) == pid
        process.kill()


SUPERVISOR = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from front_harness import SLOW
from pageflight.loop.address import CoreAddress
from pageflight.loop.local import make_supervisor
from pageflight.loop.supervisor import SupervisorConfig
supervisor = make_supervisor(SLOW, CoreAddress(Path(sys.argv[2])), config=SupervisorConfig())
supervisor.start()
supervisor.wait_ready(60)
print(supervisor.status.core_pid, flush=True)
time.sleep(60)
"""


def supervisor_command(code: str, address: CoreAddress) -> list[str]:
    return [sys.executable, "-c", code, str(Path(__file__).parent), str(address.folder)]


def test_streams_go_on_with_the_core_of_another_supervisor() -> None:
    """The stub of `engine` died and was loaded again; the fronts of the other models held on to its old core."""
    address, recorder = private_address(), Recorder()
    with subprocess.Popen(supervisor_command(SUPERVISOR, address), stdout=subprocess.PIPE) as first:
        assert first.stdout is not None and first.stdout.readline()
        front = Front(address, NumberText(), recorder)
        front.wait_ready(60)
        expected = run(front, generation(max_tokens=100)).ids()
        sink = Collector()
        front.submit(generation(max_tokens=100), sink)
        sink.wait(lambda: sink.num_ids > 10)
        first.kill()
    second = make_supervisor(SLOW, address)
    second.start()
    assert sink.wait().ids() == expected
    front.close(0)
    second.close(5)


def test_a_supervisor_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its core died with its thread, the state stayed `ready`, and every request waited for ever."""
    address = private_address()
    supervisor = make_supervisor(SLOW, address)
    with supervised(supervisor, address, Recorder()) as front:
        sink = Collector()
        front.submit(generation(max_tokens=900), sink)
        sink.wait(lambda: sink.num_ids > 10)
        monkeypatch.setattr("pageflight.loop.supervisor.read_trace", lambda _: 1 / 0)
        kill_core(address)
        error = sink.wait().finals[0].error
        assert isinstance(error, EngineLost) and "supervisor failed" in str(error)


def test_a_full_disk_does_not_end_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    address, recorder = private_address(), Recorder()
    supervisor = make_supervisor(SLOW, address)
    with supervised(supervisor, address, recorder) as front:
        sink = Collector()
        front.submit(generation(max_tokens=60), sink)
        sink.wait(lambda: sink.num_ids > 10)
        pid = core_pid(address)
        monkeypatch.setattr("pageflight.loop.supervisor.write_status", full)
        monkeypatch.setattr("pageflight.loop.supervisor.write_deaths", full)
        os.kill(pid, signal.SIGKILL)
        assert len(sink.wait().ids()) == 60


def test_a_core_that_cannot_come_back_ends_its_requests_with_engine_lost() -> None:
    """They waited for ever."""
    address, python, starts = private_address(), find_python(), []

    def command(report_fd: int, trace_fd: int, cache: CacheSize | None) -> list[str]:
        starts.append(report_fd)
        return core_command(python, SLOW, address, report_fd, trace_fd, cache) if len(starts) == 1 else ["false"]

    config = SupervisorConfig(max_failed_starts=2, backoff_s=0.05)
    recorder = Recorder()
    with supervised(Supervisor(command, address, config=config), address, recorder) as front:
        sink = Collector(2)
        front.submit(generation(max_tokens=900, n=2), sink)
        sink.wait(lambda: sink.num_ids > 10)
        kill_core(address)
        sink.wait()
        for final in sink.finals.values():
            assert final.finish_reason == "error" and isinstance(final.error, EngineLost)
            assert "exit status 1" in str(final.error)
        with pytest.raises(EngineLost):
            front.submit(generation(), Collector())
        assert not front.is_ready and len(starts) == 3


def test_an_engine_that_does_not_fit_is_refused_with_the_reason_and_not_tried_again(tmp_path: Path) -> None:
    """The one who waits must read what is wrong, not `exit status 1`."""
    spec = CoreSpec(config=CONFIG, engine_dir=str(tmp_path))
    supervisor = make_supervisor(spec, address := private_address())
    supervisor.start()
    front = Front(address, NumberText(), Recorder())
    for one in (supervisor, front):
        with pytest.raises(ManifestMismatch, match=r"manifest\.json is missing; run `pageflight build`"):
            one.wait_ready(60)
    assert supervisor.status.restarts == 0 and supervisor.status.state == "lost"
    front.close(0)
    supervisor.close(1)


def test_settings_that_cannot_work_are_refused_with_the_reason() -> None:
    spec = CoreSpec(config=CONFIG)
    with pytest.raises(ConfigError, match="engine directory"), start_core(spec, NumberText()):
        pass


def test_waiting_for_a_core_that_nobody_starts_ends() -> None:
    front = Front(private_address(), NumberText(), Recorder())
    with pytest.raises(EngineLost, match="no supervisor"):
        front.wait_ready(0.3)
    with pytest.raises(EngineLost):
        front.submit(generation(), Collector())
    front.close(0)


DYING_FRONT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from front_harness import Collector, NumberText, Recorder, generation
from pageflight.loop.address import CoreAddress
from pageflight.loop.front import Front
front = Front(CoreAddress(Path(sys.argv[1])), NumberText(), Recorder())
front.wait_ready(60)
sinks = [Collector(2) for _ in range(40)]
for sink in sinks:
    front.submit(generation(max_tokens=900, n=2), sink)
sinks[0].wait(lambda: sinks[0].num_ids > 4)
print("streaming", flush=True)
time.sleep(60)
"""


def test_a_front_that_dies_frees_all_its_sequences() -> None:
    """Its running and its waiting ones: 80 sequences on 64 rows."""
    recorder = Recorder()
    with start_core(SLOW, NumberText(), recorder) as survivor:
        arguments = [sys.executable, "-c", DYING_FRONT, str(survivor._address.folder), str(Path(__file__).parent)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"streaming\n"
            eventually(lambda: recorder.stats[-1].num_running > 0, "the core runs the other front's sequences")
            process.kill()
        sink = Collector()
        survivor.submit(generation(max_tokens=30), sink)
        sink.wait()
        eventually(lambda: is_all_free(recorder.stats[-1]), "the dead front's blocks are free")


ORPHAN_MAKER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from front_harness import SLOW
from pageflight.loop.address import private_address
from pageflight.loop.local import make_supervisor
supervisor = make_supervisor(SLOW, private_address())
supervisor.start()
supervisor.wait_ready(60)
print(supervisor.status.core_pid, supervisor._address.folder, flush=True)
time.sleep(60)
"""


def is_running(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_a_core_dies_with_the_process_that_started_it() -> None:
    """A killed stub left its core behind, with all the memory. And its directory: the next supervisor removes it."""
    arguments = [sys.executable, "-c", ORPHAN_MAKER, str(Path(__file__).parent)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid, folder = process.stdout.readline().decode().split()
        assert is_running(int(pid))
        process.kill()
    eventually(lambda: not is_running(int(pid)), "the core is gone")
    assert Path(folder).is_dir()
    address = private_address()
    address.create()
    assert not Path(folder).exists()
    address.remove()
    assert not address.folder.exists()


def test_closing_a_supervisor_drains_its_core_and_leaves_nothing() -> None:
    address = private_address()
    supervisor = make_supervisor(SLOW, address)
    supervisor.start()
    supervisor.wait_ready(60)
    front = Front(address, NumberText(), Recorder())
    front.wait_ready(60)
    sink = Collector()
    front.submit(generation(max_tokens=60), sink)
    sink.wait(lambda: sink.num_ids > 5)
    pid = core_pid(address)
    supervisor.close(drain_timeout_s=15)
    assert sink.wait().finals[0].finish_reason == "length" and len(sink.ids()) == 60
    assert not is_running(pid) and not address.folder.exists()
    front.close(0)
    assert not [thread for thread in threading.enumerate() if thread.name in ("front-responses", "core-supervisor")]


def test_nothing_is_left_open_after_many_lives() -> None:
    """File descriptors leaked with every restart of a core."""

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    with start_core(SLOW, NumberText()):
        pass
    before = descriptors()
    recorder = Recorder()
    with start_core(SLOW, NumberText(), recorder) as front:
        for lives in range(2):
            kill_core(front._address)
            eventually(lambda least=lives: len(recorder.restarts) > least, "another core takes over")
    time.sleep(0.1)
    assert descriptors() <= before


def test_a_core_that_keeps_dying_is_started_again_ever_more_slowly() -> None:
    """A crash at the first step made a loop of restarts that took a whole processor."""
    address, moments = private_address(), []

    def command(report_fd: int, trace_fd: int, cache: CacheSize | None) -> list[str]:
        moments.append(time.monotonic())
        report = 'import os, sys; os.write(int(sys.argv[1]), b\'{"kind":"ready"}\\n\')'
        return [sys.executable, "-S", "-c", report, str(report_fd)]

    supervisor = Supervisor(command, address, config=SupervisorConfig(backoff_s=0.2))
    supervisor.start()
    eventually(lambda: len(moments) >= 5, "five starts")
    supervisor.close(1)
    pauses = [after - before for before, after in pairwise(moments)]
    assert pauses[1] >= 0.2 and pauses[2] >= 0.4 and pauses[3] >= 0.8


def test_a_core_that_never_gets_ready_is_given_up_in_time() -> None:
    address = private_address()
    config = SupervisorConfig(start_timeout_s=0.3, max_failed_starts=2, backoff_s=0.01)
    supervisor = Supervisor(lambda *_: ["sleep", "60"], address, config=config)
    supervisor.start()
    with pytest.raises(EngineLost, match=r"was not ready for 0\.3 s"):
        supervisor.wait_ready(60)
    supervisor.close(1)


def test_a_core_that_cannot_be_executed_is_a_configuration_error() -> None:
    supervisor = Supervisor(lambda *_: ["/nonexistent/python"], private_address())
    supervisor.start()
    with pytest.raises(ConfigError, match="cannot start the core"):
        supervisor.wait_ready(60)
    supervisor.close(1)


def test_a_supervisor_that_does_not_read_cannot_stop_the_core() -> None:
    """The pipe of a stopped supervisor filled up, and the next sign of life blocked the loop."""
    reader, writer = os.pipe()
    reporter = Reporter(writer)
    for _ in range(20_000):
        reporter.send(Report("beat"))
    os.close(reader)
    reporter.send(Report("beat"))
    os.close(writer)


def test_openvino_does_not_phone_home() -> None:
    """Its environment variables do not exist; importing it sends an event unless the package cannot be found."""
    code = (
        "import sys; from pageflight.loop.core_process import silence_telemetry; silence_telemetry(); import openvino; "
        "assert not [m for m in sys.modules if m.startswith('openvino_telemetry.')], 'telemetry was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
