"""How fast the queue has emptied lately: what an estimate of the wait rests on."""

from __future__ import annotations

HALF_LIFE_S = 15.0
"""What happened so many seconds ago counts half."""


class DrainRate:
    """Prompt tokens that left the queue per second in which something waited. Times without a queue do not count."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0  # both fade alike
        self._last_s = 0.0
        self._was_waiting = False

    def turn(self, now_s: float, is_waiting: bool) -> None:
        """Another plan begins; whether something waits for it."""
        if self._was_waiting:
            passed_s = max(0.0, now_s - self._last_s)
            fade = 0.5 ** (passed_s / HALF_LIFE_S)
            self._tokens *= fade
            self._seconds = self._seconds * fade + passed_s
        self._last_s, self._was_waiting = now_s, is_waiting

    def leave(self, num_tokens: int) -> None:
        """A sequence with a prompt of so many tokens leaves the queue."""
        self._tokens += num_tokens

    def wait_s(self, num_tokens: int) -> float | None:
        """How long so many tokens will take to leave at this rate; None while nothing was measured."""
        if not self._seconds or not self._tokens:
            return None
        return num_tokens * self._seconds / self._tokens
