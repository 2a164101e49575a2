"""Closed loops of clients: each sends its next request when its last one has ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from perf.soak.ended import Ended
from perf.soak.errand import Ask, Errand, Via
from perf.soak.mix import Mix
from perf.soak.outages import Outages
from perf.soak.over_grpc import GrpcClient
from perf.soak.over_http import HttpClient
from perf.soak.server import HOST, Running, SoakError
from perf.soak.verdict import Outcome, Tally, Verdict, judge
from perf.wire import Model

_AWAY_PAUSE_S = 0.2
"""A refusal by a model that is away comes at once: without a pause there would be thousands."""


@dataclass(slots=True)
class Clients:
    running: Running
    name: str
    models: Mapping[str, Model]
    mix: Mix
    outages: Outages
    hang_limit_s: float
    compares: bool  # texts with those of an undisturbed time
    reference: dict[Ask, Sequence[str]] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def learn(self) -> None:
        """Ask every known question of the undisturbed server, one after the other. Raises SoakError."""
        wires = self._wires()
        for errand in self.mix.first_round():
            ended = wires(errand)
            verdict = judge(errand, ended, {}, self.outages, self.name)
            if verdict.outcome is not Outcome.COMPLETED:
                raise SoakError(f"{errand.label} of the undisturbed server: {verdict.reason or verdict.outcome.value}")
            if self.compares:
                self.reference[errand.ask] = [ended.texts[index] for index in sorted(ended.texts)]
        wires.close()

    def run(self, num_clients: int, until_s: float) -> None:
        """The load, until this moment of the monotonic clock and until everything sent has ended."""
        threads = [threading.Thread(target=self._loop, args=(until_s,), name=f"client-{n}") for n in range(num_clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _loop(self, until_s: float) -> None:
        wires = self._wires()
        while time.monotonic() < until_s and self.running.process.poll() is None:
            errand = self.mix.draw()
            with self._lock:
                self.tally.num_sent += 1
            try:
                ended = wires(errand)
                verdict = judge(errand, ended, self.reference, self.outages, self.name)
            except Exception as error:
                verdict = Verdict(Outcome.FAILED, f"the client failed: {type(error).__name__}: {error}")
            with self._lock:
                self.tally.add(errand, verdict)
            if verdict.outcome in (Outcome.AWAY, Outcome.OVERFLOW, Outcome.FAILED):
                time.sleep(_AWAY_PAUSE_S)
        wires.close()

    def _wires(self) -> _Wires:
        return _Wires(
            GrpcClient(self.running.grpc_address, self.models, name=self.name, hang_limit_s=self.hang_limit_s),
            HttpClient(HOST, self.running.http, name=self.name, hang_limit_s=self.hang_limit_s),
        )


@dataclass(frozen=True, slots=True)
class _Wires:
    """One client's ways to the server."""

    grpc: GrpcClient
    http: HttpClient

    def __call__(self, errand: Errand) -> Ended:
        return self.grpc.run(errand) if errand.via is Via.GRPC else self.http.run(errand)

    def close(self) -> None:
        self.grpc.close()
