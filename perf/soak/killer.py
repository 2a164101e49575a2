"""Kills engine cores and Triton stubs at random moments, and notes who was away when."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from perf.processes import Life, Sample, tree
from perf.soak.outages import Outage, Outages
from perf.soak.server import Running

RETURN_LIMIT_S = 90.0
"""A model that died repeatedly is loaded again after a pause of up to 30 s."""
_SHARE_EARLY = 0.2
"""Of the kills may meet a core that still starts."""
_LOOK_S = 0.6  # the gauge is published twice a second
_AFTERMATH_S = 3.0
"""What was open ends within this time after the model is back."""

ENSEMBLE_STEPS = ("engine", "preprocessing", "postprocessing")
"""Models whose reload Triton answers by unloading the ensemble, whether it uses them or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KillPlan:
    """Mean seconds between two kills; 0: none. Each interval is drawn between half and one and a half of it."""

    core_every_s: float
    stub_every_s: float


@dataclass(slots=True)
class Killer:
    """Kills until it is told to stop."""

    running: Running
    name: str  # of the text model
    plan: KillPlan
    outages: Outages
    seed: int
    killed: set[Life] = field(default_factory=set)
    num_core_kills: int = 0
    stub_kills: list[str] = field(default_factory=list)  # models
    return_s: list[float] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _chance: random.Random = field(init=False)
    _victims: Iterator[str] = field(init=False)

    def __post_init__(self) -> None:
        self._chance = random.Random(f"kills {self.seed}")
        self._victims = self._models()

    def start(self) -> None:
        for kill, every_s in ((self.kill_core, self.plan.core_every_s), (self.kill_stub, self.plan.stub_every_s)):
            if every_s:
                self._threads.append(threading.Thread(target=self._repeat, args=(kill, every_s), daemon=True))
                self._threads[-1].start()

    def stop(self) -> None:
        """No more kills; returns when every model is back or has been waited for."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def kill_core(self) -> None:
        """Now; nothing happens while there is none."""
        cores = [sample for sample in tree(self.running.process.pid) if sample.life.role == "core"]
        if cores:
            self._kill(self._chance.choice(cores))
            self.num_core_kills += 1

    def kill_stub(self) -> None:
        """Now; returns when its model is back or has been waited for."""
        model = next(self._victims)
        samples = tree(self.running.process.pid)
        stubs = [sample for sample in samples if sample.life.role == f"stub {model}"]
        if not stubs:
            return
        away = [model, "ensemble"] if model in ENSEMBLE_STEPS else [model]
        begun = [self.outages.begin(each, time.monotonic()) for each in away]
        seen = len(self.running.log)
        self.stub_kills.append(model)
        # The core dies with its stub, and the model's other stubs are replaced.
        parents = {stub.life.pid for stub in stubs}
        self.killed.update(sample.life for sample in samples if parents & {sample.life.pid, sample.parent})
        self._kill(self._chance.choice(stubs))
        self._wait_back(model, seen, begun)

    def _repeat(self, kill: Callable[[], None], every_s: float) -> None:
        while not self._stopping.wait(every_s * self._chance.uniform(0.5, 1.5)):
            kill()
            if self._chance.random() > _SHARE_EARLY:
                self._wait_ready()

    def _wait_ready(self) -> None:
        """Cores that are killed faster than they start get nothing done, and nothing would be tried."""
        until_s = time.monotonic() + RETURN_LIMIT_S
        while time.monotonic() < until_s and not self._stopping.wait(_LOOK_S):
            if any(
                value for name, value in self.running.series().items() if name.startswith("pageflight_engine_ready")
            ):
                return

    def _models(self) -> Iterator[str]:
        """Models in turn, each as often as the others."""
        while True:
            turn = [self.name, f"{self.name}_unary", *ENSEMBLE_STEPS]
            self._chance.shuffle(turn)
            yield from turn

    def _wait_back(self, model: str, seen: int, begun: list[Outage]) -> None:
        killed_s = time.monotonic()
        while time.monotonic() - killed_s < RETURN_LIMIT_S:
            if self.running.has_logged(rf"watchdog: {model} is back", since=seen):
                self.return_s.append(time.monotonic() - killed_s)
                for outage in begun:
                    outage.end_s = time.monotonic() + _AFTERMATH_S
                return
            time.sleep(0.1)

    def _kill(self, victim: Sample) -> None:
        self.killed.add(victim.life)
        with suppress(ProcessLookupError):
            os.kill(victim.life.pid, signal.SIGKILL)
