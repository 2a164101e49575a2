"""Ranks that Ray starts."""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe

import torch

from pageflight.core.config import EngineConfig
from pageflight.core.errors import ConfigError, RankLost, RanksMissing
from pageflight.models.stages import Place
from pageflight.ranks.key import KEY
from pageflight.ranks.launcher import Ended, Progress
from pageflight.ranks.listener import RankListener, RemoteRank
from pageflight.ranks.local_launcher import worker_environment
from pageflight.ranks.ray_messages import (
    Kill,
    Over,
    Placed,
    Refused,
    Start,
    ToDriver,
    Waiting,
    Wanted,
    decode_from_driver,
    encode,
)

log = logging.getLogger(__name__)

NEWS_S = 1.0
"""How long Ray's word on a rank is waited for when its line has ended."""
CLOSE_S = 5.0
_LOOK_S = 0.25
_SPARE_S = 10.0
"""What the driver has beyond `rank_wait_s` to say by itself what is missing."""


class RayRank:
    """A rank that Ray started and that dialled in."""

    def __init__(self, remote: RemoteRank, driver: _Driver, address: str) -> None:
        self.rank, self.name = remote.rank, f"{remote.name} ({address})"
        self.line = remote.line
        self._remote, self._driver = remote, driver
        driver.on_over(remote.rank, remote.kill)

    def hang_up(self) -> None:
        self._remote.hang_up()

    def wait(self, timeout_s: float | None = None) -> Ended | None:
        known = self._remote.wait(timeout_s)
        return known and (self._driver.over(self.rank, NEWS_S) or known)

    def kill(self) -> None:
        self._driver.kill(self.rank)
        self._remote.kill()


class RayLauncher:
    """Has a Ray cluster set machines aside, starts the other ranks on them, and waits for them to dial in.

    Ranks that share a machine with the core see one GPU each as well, so the core's own must be none of theirs: it
    is the one that Ray gives to the first rank.
    """

    def __init__(self, config: EngineConfig, progress: Progress) -> None:
        self._config, self._progress = config, progress
        self._ranks_per_node = config.tensor_parallel * config.pipeline_parallel // config.num_nodes
        self._driver: _Driver | None = None
        self._listener: RankListener | None = None
        self.host, self.device_index = "", 0

    def start(self, places: Sequence[Place]) -> Sequence[RayRank]:
        """Raises RanksMissing, ConfigError, RankLost for one that ended before it dialled in."""
        deadline_s = time.monotonic() + self._config.rank_wait_s
        self._driver = driver = _Driver(self._wanted(), self._progress)
        placed = driver.placed(self._config.rank_wait_s + _SPARE_S)
        self.host = placed.addresses[0]
        if placed.gpu:
            self.device_index = index_of_gpu(placed.gpu, os.environ)
        key = secrets.token_hex(32)
        ranks = [place.rank for place in places]
        self._listener = listener = RankListener(ranks, key.encode(), host=self.host)
        dial = ("pageflight.runners.rank_worker", f"--connect={_host_port(self.host, listener.port)}")
        dial += (f"--wait-s={self._config.rank_wait_s}",)
        driver.send(Start({rank: (*dial, f"--rank={rank}") for rank in ranks}, {KEY: key}))
        addresses = {rank: placed.addresses[rank // self._ranks_per_node] for rank in ranks}
        self._progress(f"waiting for ranks on {', '.join(dict.fromkeys(addresses.values()))} to load")
        there = self._dialled_in(listener, driver, addresses, max(_SPARE_S, deadline_s - time.monotonic()))
        return [RayRank(remote, driver, addresses[remote.rank]) for remote in there]

    def close(self) -> None:
        if self._driver is not None:
            self._driver.close()
        if self._listener is not None:
            self._listener.close()

    def _wanted(self) -> Wanted:
        config, on_gpus = self._config, torch.cuda.is_available()
        return Wanted(
            address=config.ray_address,
            num_nodes=config.num_nodes,
            ranks_per_node=self._ranks_per_node,
            resource="GPU" if on_gpus else "CPU",
            amount=1 if on_gpus else max(1, config.num_threads // self._ranks_per_node),
            wait_s=config.rank_wait_s,
        )

    def _dialled_in(
        self, listener: RankListener, driver: _Driver, addresses: Mapping[int, str], wait_s: float
    ) -> list[RemoteRank]:
        deadline_s = time.monotonic() + wait_s
        while True:
            try:
                return listener.wait(_LOOK_S, lambda missing: None)
            except RanksMissing as error:
                for rank, address in addresses.items():
                    over = driver.over(rank)
                    if over is not None:
                        raise RankLost(
                            f"rank {rank} on {address} ended before it dialled in ({over.words}); its output is in Ray's"
                            " logs there",
                            over.return_code,
                        ) from None
                if time.monotonic() > deadline_s:
                    raise RanksMissing(f"{error}, though Ray has started all; they run {addresses}") from None


class _Driver:
    """The process that is a driver of the Ray cluster for this one (`ranks.ray_driver`)."""

    def __init__(self, wanted: Wanted, progress: Progress) -> None:
        """Raises ConfigError where Ray is not installed."""
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("launcher='ray': Ray is not installed; pip install 'pageflight[ray]'")
        self._progress, self._wanted = progress, wanted
        self._changed = threading.Condition()
        self._first: Placed | Refused | None = None
        self._over: dict[int, Ended] = {}
        self._hearing = True
        self._on_over = {}
        self._line, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", "pageflight.ranks.ray_driver"]
            command += [f"--line-fd={theirs.fileno()}", f"--parent-pid={os.getpid()}"]
            self._process = subprocess.Popen(
                command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, env=worker_environment()
            )
        self.send(wanted)
