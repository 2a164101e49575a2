"""Which sequences kill cores: counted, kept from the next core, and given up once that has shown that it works.

Without that last step an engine that is broken would make every request guilty, one after another.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from pageflight.core.errors import PoisonRequest
from pageflight.core.request import Request
from pageflight.loop.core_link import CoreLink
from pageflight.loop.deaths import Death
from pageflight.loop.open_sequence import OpenSequence
from pageflight.loop.takeover import probe, replays

log = logging.getLogger(__name__)

Groups = Mapping[int, list[OpenSequence]]
"""The open sequences of each generation."""


class Verdicts:
    """Of one front. Used by its response thread; what takes `Groups` under its lock."""

    def __init__(self, core: CoreLink) -> None:
        self._core = core
        self._guilty: dict[OpenSequence, None] = {}
        self._probe = -1

    def is_probe(self, handle: int) -> bool:
        """Whether this is the request that shows whether the core works."""
        return handle == self._probe

    def count(self, death: Death, groups: Groups) -> None:
        """What the last core's death says against those that were open."""
        for group in groups.values():
            killers = [sequence for sequence in group if self._core.blame(death, sequence)]
            if killers and not any(sequence.output_ids for sequence in group):
                killers = group  # it is the prompt that kills, which they have in common
            self._guilty.update(dict.fromkeys(killers))

    def is_guilty(self, sequence: OpenSequence) -> bool:
        """Whether the next core of its own is kept from it."""
        return sequence in self._guilty

    def requests(self, groups: Groups, probe_handle: int) -> Iterator[tuple[Request, list[OpenSequence]]]:
        """What to ask the next core for, with those that each request is for. The probe, if one is needed, is first."""
        if self._guilty:
            self._probe = probe_handle
            yield probe(probe_handle), []
        yield from replays([s for s in group if s not in self._guilty] for group in groups.values())

    def pronounce(self) -> Iterator[tuple[OpenSequence, PoisonRequest]]:
        """The core works: the guilty, some of which may have ended meanwhile, with what their clients are told."""
        guilty, self._guilty, self._probe = self._guilty, {}, -1
        for sequence in guilty:
            log.error("request %r kills the engine core; it is given up", sequence.generation.request_id)
            message = "the engine core died each time it computed this request; do not send it again"
            yield sequence, PoisonRequest(message)
