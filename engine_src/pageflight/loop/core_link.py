"""The core that a front talks to, one after another: which one it is, what it was sent, when it last spoke."""

from __future__ import annotations

import time
from collections import deque

from pageflight.core.request import Request
from pageflight.loop.client import CoreClient
from pageflight.loop.deaths import Death
from pageflight.loop.frames import Beat, Cancel, CoreLimits, Hello, Leave, Submit
from pageflight.loop.open_sequence import OpenSequence
from pageflight.sched.admission import AdmissionLimits

SILENT_AFTER_S = 5.0
"""A core from which nothing has come for so long does not answer, unless its steps have been known to be longer."""
LONG_STEPS = 3
MAX_SILENCE_S = 30.0
"""It speaks only between steps. The longest silence that it broke, so many times over, is nothing unusual, within this
limit."""


class CoreLink:
    """One front's relation to its core. Commands are given under the front's lock, news told by its response thread."""

    def __init__(self, client: CoreClient) -> None:
        self._client = client
        self.limits: CoreLimits | None = None
        """What the last core said of itself."""
        self.epoch: int | None = None
        """Of the core that takes commands; None while there is none."""
        self.last_epoch: int | None = None
        self.is_leaving = False
        """It finishes what it has and takes nothing new."""
        self.lost_s: float | None = None
        """When the last core went."""
        self._base = 0  # between this front's numbers and those of the core of `last_epoch`
        self._unconfirmed: deque[list[OpenSequence]] = deque()  # per request sent, in order
        self._num_confirmed = 0
        self._heard_s = 0.0
        self._patience_s = SILENT_AFTER_S

    @property
    def is_up(self) -> bool:
        return self.epoch is not None

    @property
    def answers(self) -> bool:
        """Whether there is a core that takes requests and has spoken lately: one that hangs keeps its sockets open."""
        return self.epoch is not None and not self.is_leaving and time.monotonic() - self._heard_s <= self._patience_s

    @property
    def absent_s(self) -> float:
        """For how long the last core has been gone; 0 while there is one, or was none."""
        return time.monotonic() - self.lost_s if self.epoch is None and self.lost_s is not None else 0.0

    # ---- commands

    def submit(self, request: Request, sequences: list[OpenSequence]) -> None:
        """`sequences` are the open ones of `request`."""
        assert self.epoch is not None
        self._client.send(Submit(self.epoch, self._client.identity, request))
        self._unconfirmed.append(sequences)

    def end(self, handles: tuple[int, ...], *, by_client: bool) -> None:
        if self.epoch is not None and handles:
            self._client.send(Cancel(self.epoch, self._client.identity, handles, by_client))

    def leave(self) -> None:
        """Take leave of the core, if there is one."""
        if self.epoch is not None:
            self._client.send(Leave(self.epoch, self._client.identity))
        self.epoch = None

    # ---- news

    def meet(self, hello: Hello) -> None:
        """Another core takes commands, or the same one over another connection."""
        self.epoch = self.last_epoch = hello.epoch
        self._base, self.limits = hello.front_base, hello.limits
        self.is_leaving = False
        self._unconfirmed.clear()
        self._num_confirmed = 0
        self._heard_s, self._patience_s = time.monotonic(), SILENT_AFTER_S

    def lose(self) -> None:
        if self.epoch is not None:
            self.epoch, self.lost_s = None, time.monotonic()

    def hear(self) -> None:
        """The core has said something."""
        now_s = time.monotonic()
        silence_s, self._heard_s = now_s - self._heard_s, now_s
        if LONG_STEPS * silence_s > self._patience_s:
            self._patience_s = min(LONG_STEPS * silence_s, MAX_SILENCE_S)

    def confirm(self, beat: Beat) -> None:
        """What it has taken in is accepted; what it refused has ended already, or waits for another core's word."""
        if beat.epoch != self.epoch:
            return
        # Commands of a connection that broke may be counted with those of the next: no more than were sent.
        while self._num_confirmed < beat.num_taken and self._unconfirmed:
            self._num_confirmed += 1
            for sequence in self._unconfirmed.popleft():
                sequence.is_accepted |= beat.epoch not in sequence.refused_by

    def blame(self, death: Death, sequence: OpenSequence) -> bool:
        """Count the last core's death against a sequence. True: it has killed it, and others before."""
        handle = self._base + sequence.handle
        sequence.suspicion.blame(death, handle)
        return sequence.suspicion.is_guilty and death.proves_guilt(handle)


def admission_of(limits: CoreLimits) -> AdmissionLimits:
    """What a core with these limits refuses whenever it comes, so that its front can."""
    return AdmissionLimits(
        max_model_len=limits.max_model_len,
        num_blocks=limits.num_blocks,
        block_size=limits.block_size,
        vocab_size=limits.vocab_size,
        max_sequences=limits.max_queue_size,
    )
