"""Ranks that others start: torchrun, a Kubernetes LeaderWorkerSet, `pageflight join` by hand."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from pageflight.core.config import EngineConfig
from pageflight.core.errors import RankLost
from pageflight.models.stages import Place
from pageflight.ranks.key import rank_key
from pageflight.ranks.launcher import Progress, RankHandle
from pageflight.ranks.listener import RankListener, RemoteRank, named
from pageflight.ranks.local_launcher import LOOPBACK, LocalRank, dismiss
from pageflight.ranks.network import gone_s

log = logging.getLogger(__name__)

EVERY_RANK_JOINS = "PAGEFLIGHT_EVERY_RANK_JOINS"
"""Variable of the environment that `pageflight node` sets to 1 where torchrun starts a process for each rank: then also
those of this machine dial in."""


class ExternalLauncher:
    """Starts the ranks of this machine, unless torchrun does, and waits for all others to dial in."""

    def __init__(self, config: EngineConfig, progress: Progress) -> None:
        self._config, self._progress = config, progress
        self._num_ranks = config.tensor_parallel * config.pipeline_parallel
        self._listener: RankListener | None = None
        self.host, self.device_index = "", 0

    def start(self, places: Sequence[Place]) -> Sequence[RankHandle]:
        num_local = self._num_ranks // self._config.num_nodes
        if os.environ.get(EVERY_RANK_JOINS) == "1":
            num_local = 1
        remote = [place.rank for place in places if place.rank >= num_local]
        if remote:
            gone_s()  # raises for what no connection could tell
            self._listener = RankListener(remote, rank_key(), port=self._config.rank_port)
        local: list[LocalRank] = []
        try:
            for place in places:
                if place.rank < num_local:
                    local.append(LocalRank(place.rank))
            there: list[RemoteRank] = []
            if self._listener is not None:
                there = self._listener.wait(self._config.rank_wait_s, self._tell, lambda: _check(local))
        except BaseException:
            dismiss(local)
            raise
        self.host = there[-1].host if there else LOOPBACK
        return [*local, *there]

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()

    def _tell(self, missing: Sequence[int]) -> None:
        nodes = sorted({rank * self._config.num_nodes // self._num_ranks for rank in missing})
        words = ", ".join(map(str, nodes))
        message = f"waiting for {named(missing)} of node{'s' if len(nodes) > 1 else ''} {words} to dial in"
        log.info("%s", message)
        self._progress(message)


def _check(local: Sequence[LocalRank]) -> None:
    """Raises RankLost: others are waited for in vain."""
    for each in local:
        ended = each.wait(0.0)
        if ended is not None:
            raise RankLost(f"{each.name} died ({ended.words})", return_code=ended.return_code)
