"""Ranks that Ray starts."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Collection, Mapping, Sequence

import torch

from pageflight.core.config import EngineConfig
from pageflight.core.errors import ConfigError, RankLost, RanksMissing
from pageflight.models.stages import Place
from pageflight.ranks.key import KEY
from pageflight.ranks.launcher import Ended, Progress
from pageflight.ranks.listener import RankListener, RemoteRank
from pageflight.ranks.network import GONE
from pageflight.ranks.ray_line import RayLine
from pageflight.ranks.ray_messages import Kill, Start, Wanted

VISIBLE = "CUDA_VISIBLE_DEVICES"
NEWS_S = 0.3
"""How long Ray's word on a rank is waited for when its line has ended: less than anybody waits for the loss."""
LEAST_DIAL_S = 30.0
"""What ranks that Ray has room for have to import torch and dial in, however long there was none."""
SHARED = ("NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_GLOO_", GONE)
"""Beginnings of names in the environment that must be alike on all machines."""
OWN = ("NCCL_HOSTID", "NCCL_CONF_FILE", "NCCL_TOPO_FILE", "NCCL_IB_HCA", "NCCL_DEBUG_FILE")
"""And names among them, beside those of interfaces, that mean something else on each machine."""
_LOOK_S = 0.25


class RayRank:
    """A rank that Ray started and that dialled in."""

    def __init__(self, remote: RemoteRank, driver: RayLine, address: str) -> None:
        self.rank, self.name = remote.rank, f"{remote.name} ({address})"
        self.line = remote.line
        self._remote, self._driver = remote, driver
        driver.on_over(remote.rank, remote.kill)  # a line may outlive its machine

    def hang_up(self) -> None:
        self._remote.hang_up()

    def wait(self, timeout_s: float | None = None) -> Ended | None:
        known = self._remote.wait(timeout_s)
        return known and (self._driver.over(self.rank, NEWS_S) or known)

    def kill(self) -> None:
        self._driver.send(Kill(self.rank))
        self._remote.kill()


class RayLauncher:
    """Has a Ray cluster set machines aside, starts the other ranks on them, and waits for them to dial in.

    Ranks that share a machine with the core see one GPU each as well, so the core's own must be none of theirs: it
    is the one that Ray gives to the first rank.
    """

    def __init__(self, config: EngineConfig, progress: Progress) -> None:
        self._config, self._progress = config, progress
        self._ranks_per_node = config.tensor_parallel * config.pipeline_parallel // config.num_nodes
        self._driver: RayLine | None = None
        self._listener: RankListener | None = None
        self.host, self.device_index = "", 0

    def start(self, places: Sequence[Place]) -> Sequence[RayRank]:
        deadline_s = time.monotonic() + self._config.rank_wait_s
        driver = self._driver = RayLine(self._wanted(), self._progress)
        placed = driver.placed()
        self.host = placed.addresses[0]
        if placed.gpu:
            self.device_index = index_of_gpu(placed.gpu, os.environ)
        if ":" in self.host:
            raise ConfigError(
                f"Ray knows this machine by {self.host}: ranks need IPv4, an address of which ray start"
                " --node-ip-address takes"
            )
        key = secrets.token_hex(32)
        addresses = {place.rank: placed.addresses[place.rank // self._ranks_per_node] for place in places}
        listener = self._listener = self._listen(addresses.keys(), key)
        dial = (f"--connect={self.host}:{listener.port}", f"--wait-s={LEAST_DIAL_S}")
        commands = {rank: ("pageflight.runners.rank_worker", *dial, *self._flags(rank)) for rank in addresses}
        driver.send(Start(commands, {**shared_environment(os.environ), KEY: key}))
        self._progress(f"waiting for ranks on {', '.join(dict.fromkeys(addresses.values()))}")
        there = dialled_in(listener, driver, addresses, max(LEAST_DIAL_S, deadline_s - time.monotonic()))
        return [RayRank(remote, driver, addresses[remote.rank]) for remote in there]

    def close(self) -> None:
        if self._driver is not None:
            self._driver.close()
        if self._listener is not None:
            self._listener.close()

    def _listen(self, ranks: Collection[int], key: str) -> RankListener:
        try:
            return RankListener(ranks, key.encode(), host=self.host)
        except ConfigError as error:
            words = str(error).rpartition(": ")[2]
            raise ConfigError(f"ranks cannot dial in to {self.host}, Ray's address of this machine: {words}") from None

    def _flags(self, rank: int) -> tuple[str, ...]:
        """The first rank of each other machine hashes the engine's files there."""
        is_first = rank >= self._ranks_per_node and rank % self._ranks_per_node == 0
        return (f"--rank={rank}", *(["--verify"] if is_first else []))

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


def dialled_in(
    listener: RankListener, driver: RayLine, addresses: Mapping[int, str], wait_s: float
) -> list[RemoteRank]:
    """All of them. Raises RankLost for one that ended instead, RanksMissing."""
    deadline_s = time.monotonic() + wait_s
    while True:
        try:
            return listener.wait(_LOOK_S, lambda _: None)
        except RanksMissing:
            for rank, address in addresses.items():
                over = driver.over(rank)
                if over is not None:
                    raise RankLost(
                        f"rank {rank} on {address} ended before it dialled in ({over.words}); what it said is in Ray's"
                        " logs on that machine",
                        over.return_code,
                    ) from None
            if time.monotonic() > deadline_s:
                raise


def shared_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What ranks on other machines get of the first one's environment: settings of what they say to each other, but for
    names that are a machine's own."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(SHARED) and not name.endswith("_IFNAME") and name not in OWN
    }


def index_of_gpu(gpu: str, environment: Mapping[str, str]) -> int:
    """Of the GPU that Ray calls `gpu`, among those that this process sees. Raises ConfigError where it is not."""
    visible = environment.get(VISIBLE)
    if visible is None and gpu.isdigit():
        return int(gpu)
    names = [name.strip() for name in (visible or "").split(",")]
    if gpu not in names:
        raise ConfigError(
            f"Ray gives GPU {gpu} to the first rank, which sees {VISIBLE}={visible!r}: start the server with all GPUs"
            " of its Ray node"
        )
    return names.index(gpu)
