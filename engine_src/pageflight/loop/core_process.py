"""The engine core as a process: `python -m pageflight.loop.core_process --folder DIR --spec JSON …`.

It loads the engine, meets its fronts at the address, steps until its supervisor has it drain, and dies with the process
that started it. What its starter must know goes through the report pipe.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from pageflight import __version__
from pageflight.core.config import EngineConfig
from pageflight.core.devices import DeviceSet
from pageflight.core.errors import ConfigError, PageflightError, RankLost
from pageflight.core.parent import die_with
from pageflight.core.plan import StepPlan, StepResult
from pageflight.core.stats import CoreStats
from pageflight.core.tenants import Tenants
from pageflight.loop.address import CoreAddress
from pageflight.loop.clock import monotonic_clock
from pageflight.loop.deaths import is_crash
from pageflight.loop.engine_loop import Drain, EngineLoop
from pageflight.loop.frames import CoreLimits, error_to_wire
from pageflight.loop.mailbox import ZmqMailbox
from pageflight.loop.recorder import Recorder, recording_path
from pageflight.loop.recording import Died, Header
from pageflight.loop.reports import DRAIN_SIGNAL, CacheSize, Report, Reporter
from pageflight.loop.step_trace import StepTrace
from pageflight.loop.tenants_file import TenantsFile
from pageflight.loop.watch import Watch
from pageflight.loop.watched_scheduler import WatchedScheduler, shown
from pageflight.runners.base import Runner, RunnerLimits, SharedRunner, SparingRunner
from pageflight.runners.faulty import Fault
from pageflight.sched.scheduler import Scheduler

log = logging.getLogger("pageflight.core")


class FakeEngine(msgspec.Struct, frozen=True, kw_only=True):
    """An engine without a model: `checking` notices every mistake of the scheduler, `instant` costs nothing.

    `step_s` is slept in every step, so that a test has a middle of a stream to act in; `start_s` before the first.
    `faults` are of a checking engine.
    """

    kind: Literal["checking", "instant"] = "checking"
    vocab_size: int = 400
    first_id: int = 0
    num_blocks: int = 1024
    step_s: float = 0.0
    start_s: float = 0.0
    faults: tuple[Fault, ...] = ()


class CoreSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a core runs: an engine directory, or a fake."""

    config: EngineConfig
    engine_dir: str = ""
    num_instances: int = 1
    """Cores that share this machine's memory and compute cores, or the GPU where `devices` are any."""
    devices: DeviceSet = DeviceSet()
    """What it has to itself: who starts it gives it these (`loop.devices`)."""
    fake: FakeEngine | None = None
    tenants_file: str = ""
    """Where the shares of tenants stand; empty: those of the configuration."""
    instance: int = 0
    watch: Watch = Watch()

    def with_cache(self, cache: CacheSize) -> CoreSpec:
        """With a cache of this size, however much memory is free."""
        config = replace(
            self.config,
            kv=replace(self.config.kv, num_blocks=cache.num_blocks),
            scheduler=replace(self.config.scheduler, max_model_len=cache.max_sequence_len),
        )
        return msgspec.structs.replace(self, config=config)


def core_command(
    python: str, spec: CoreSpec, address: CoreAddress, report_fd: int, trace_fd: int, cache: CacheSize | None = None
) -> list[str]:
    """The command line of a core whose end of the report pipe is `report_fd`, and its memory file `trace_fd`.

    `cache`: the size that the core before it had.
    """
    if cache is not None:
        spec = spec.with_cache(cache)
    return [
        python,
        "-m",
        "pageflight.loop.core_process",
        f"--folder={address.folder}",
        f"--spec={msgspec.json.encode(spec).decode()}",
        f"--report-fd={report_fd}",
        f"--trace-fd={trace_fd}",
        f"--parent-pid={os.getpid()}",
    ]


def main() -> int:
    arguments = _arguments()
    for number in (signal.SIGTERM, signal.SIGINT):  # whose group they are sent to has a supervisor: that decides
        signal.signal(number, signal.SIG_IGN)
    die_with(arguments.parent_pid)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    reporter = Reporter(arguments.report_fd)
    try:
        spec = msgspec.json.decode(arguments.spec, type=CoreSpec)
        reporter.send(Report("progress", "loading the engine"))
        address = CoreAddress(Path(arguments.folder))
        tenants_file = TenantsFile(Path(spec.tenants_file), address.tenants) if spec.tenants_file else None
        if tenants_file is not None:
            spec = _with_tenants(spec, tenants_file.load())
        runner, config = _load(
            spec, partial(_give_up, reporter), lambda words: reporter.send(Report("progress", words))
        )
        reporter.send(Report("progress", "opening the line to the fronts"))
        _serve(runner, config, address, reporter, spec, tenants_file, arguments.trace_fd)
    except Exception as error:
        if isinstance(error, PageflightError):
            log.error("the engine core ends: %s", error)  # it says what to do: a traceback would only bury it
        else:
            log.exception("the engine core ends")
        reporter.send(_last_words(error))
        logging.shutdown()
        os._exit(1)  # what a device still does, or waits for, must not hold up the next core
    return 0


def _give_up(reporter: Reporter, error: PageflightError) -> None:
    """End this process from a thread beside the one that works, which cannot be reached."""
    log.error("the engine core ends: %s", error)
    reporter.send(_last_words(error))
    os._exit(1)


def _last_words(error: Exception) -> Report:
    name, message = error_to_wire(error)
    is_killed = isinstance(error, RankLost) and error.return_code is not None and not is_crash(error.return_code)
    return Report("failed", message, name, of_itself=not is_killed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pageflight.loop.core_process", description=__doc__)
    parser.add_argument("--folder", required=True, help="directory of the sockets (see loop/address.py)")
    parser.add_argument("--spec", required=True, help="CoreSpec as JSON: engine directory and configuration")
    parser.add_argument("--report-fd", type=int, default=-1, help="pipe to the supervisor")
    parser.add_argument("--trace-fd", type=int, default=-1, help="memory file that tells what it was doing if it dies")
    parser.add_argument("--parent-pid", type=int, default=0, help="process to die with; 0: nobody")
    return parser.parse_args()


def silence_telemetry() -> None:
    """Keep `import openvino` from telling Intel about it. No environment variable does; but where its telemetry package
    cannot be imported, OpenVINO takes an empty one. To be called before the first import of `openvino`."""
    modules: dict[str, object] = sys.modules  # type: ignore[assignment]
    modules.setdefault("openvino_telemetry", None)


def _load(
    spec: CoreSpec, on_loss: Callable[[PageflightError], None], progress: Callable[[str], None]
) -> tuple[Runner, EngineConfig]:
    """The runner, and the configuration with its limits and its cache's size resolved."""
    config = spec.config
    runner: Runner
    if spec.fake is not None:
        runner = _fake_runner(spec.fake, config)
    elif spec.engine_dir:
        silence_telemetry()
        # The runner brings the model's libraries with it; a fake core does without them.
        from pageflight.runners.factory import load_engine

        runner = load_engine(
            Path(spec.engine_dir),
            config,
            num_instances=spec.num_instances,
            on_loss=on_loss,
            progress=progress,
            needs_gpu=str(spec.devices) if spec.devices.kind == "gpu" else "",
        ).runner
    else:
        raise ConfigError("neither an engine directory nor a fake engine was named")
    limits = runner.limits
    return runner, replace(
        config,
        kv=replace(
            config.kv,
            num_blocks=limits.num_blocks,
            block_size=limits.block_size,
            num_host_blocks=limits.num_host_blocks,
            host_copy_s=limits.host_copy_s,
        ),
        scheduler=replace(
            config.scheduler,
            max_model_len=limits.max_model_len,
            max_num_seqs=limits.max_num_seqs,
            token_tile=limits.token_tile,
            replay_rows=limits.replay_rows,
        ),
    )


def _with_tenants(spec: CoreSpec, tenants: Tenants) -> CoreSpec:
    config = replace(spec.config, scheduler=replace(spec.config.scheduler, tenants=tenants))
    return msgspec.structs.replace(spec, config=config)


def _serve(
    runner: Runner,
    config: EngineConfig,
    address: CoreAddress,
    reporter: Reporter,
    spec: CoreSpec,
    tenants_file: TenantsFile | None,
    trace_fd: int,
) -> None:
    def beat() -> None:
        reporter.send(Report("beat"))
        tenants = tenants_file.poll(monotonic_clock()) if tenants_file is not None else None
        if tenants is not None:
            scheduler.set_tenants(tenants)

    limits = runner.limits
    recorder = _recorder(spec, config, limits.vocab_size) if spec.watch.record else None
    scheduler = _scheduler(spec, config, limits.vocab_size, recorder)
    mailbox = ZmqMailbox(
        address,
        CoreLimits(
            max_model_len=limits.max_model_len,
            num_blocks=limits.num_blocks,
            block_size=limits.block_size,
            vocab_size=limits.vocab_size,
            max_num_seqs=limits.max_num_seqs,
            max_queue_size=config.scheduler.max_queue_size,
        ),
        beat=beat,
    )

    def report(stats: CoreStats) -> None:
        num_shortages = runner.num_shortages if isinstance(runner, SparingRunner) else 0
        idle_share = runner.idle_share if isinstance(runner, SharedRunner) else 0.0
        stats = replace(stats, cpu_memory_bytes=_resident_bytes(), pipeline_idle_share=idle_share)
        mailbox.publish_stats(replace(stats, memory_shortages=num_shortages))

    trace = StepTrace(trace_fd, mailbox.epoch, limits.max_num_seqs * limits.max_in_flight)
    loop = EngineLoop(scheduler=scheduler, runner=runner, mailbox=mailbox, trace=trace, report=report)
    signal.signal(DRAIN_SIGNAL, lambda *_: mailbox.stop(Drain()))
    # What start-up made lives as long as the process: keep the collector from walking through it again and again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    cache = CacheSize(num_blocks=limits.num_blocks, max_sequence_len=limits.max_model_len, block_size=limits.block_size)
    reporter.send(Report("ready", cache=cache))
    linger_s = 0.1  # after a failure the next core must not wait for fronts that are behind: they ask again anyway
    try:
        loop.run()
        linger_s = 2.0
    except Exception as error:
        if recorder is not None:
            recorder.add(Died(shown(error)))
        raise
    finally:
        if recorder is not None:
            recorder.close()
        mailbox.close(linger_s)
    runner.close()  # not after a failure: a device may be waiting for ranks that are gone, and would be waited for


def _scheduler(spec: CoreSpec, config: EngineConfig, vocab_size: int, recorder: Recorder | None) -> Scheduler:
    check_every = spec.watch.check_invariants
    if recorder is None and not check_every:
        return Scheduler(config.scheduler, config.kv, vocab_size=vocab_size)
    return WatchedScheduler(
        config.scheduler, config.kv, vocab_size=vocab_size, recorder=recorder, check_every=check_every
    )


def _recorder(spec: CoreSpec, config: EngineConfig, vocab_size: int) -> Recorder:
    recorder = Recorder(
        recording_path(Path(spec.watch.record), spec.instance),
        Header(
            version=__version__,
            pid=os.getpid(),
            instance=spec.instance,
            started_ns=time.time_ns(),
            engine_dir=spec.engine_dir,
            num_instances=spec.num_instances,
            config=config,
            vocab_size=vocab_size,
        ),
    )
    log.info("recording to %s", recorder.path)
    return recorder


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _fake_runner(fake: FakeEngine, config: EngineConfig) -> Runner:
    from pageflight.runners.fake import FakeRunner, InstantRunner
    from pageflight.runners.faulty import FaultyRunner

    limits = RunnerLimits(
        num_blocks=config.kv.num_blocks or fake.num_blocks,
        num_host_blocks=config.kv.num_host_blocks,
        block_size=config.kv.block_size,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_model_len=config.scheduler.max_model_len,
        vocab_size=fake.vocab_size,
    )
    runner: Runner = InstantRunner(limits, first_id=fake.first_id)
    if fake.kind == "checking":
        checking = FakeRunner(limits)
        runner = FaultyRunner(checking, fake.faults) if fake.faults else checking
    time.sleep(fake.start_s)
    return _SlowRunner(runner, fake.step_s) if fake.step_s else runner


class _SlowRunner:
    """A runner whose steps take at least `step_s` seconds."""

    def __init__(self, runner: Runner, step_s: float) -> None:
        self.limits = runner.limits
        self._runner, self._step_s = runner, step_s

    def submit(self, plan: StepPlan) -> None:
        self._runner.submit(plan)

    def collect(self) -> StepResult:
        time.sleep(self._step_s)
        return self._runner.collect()

    def close(self) -> None:
        self._runner.close()


if __name__ == "__main__":
    sys.exit(main())
