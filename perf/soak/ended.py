"""What a client saw of one request, before anybody judges it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Ended:
    """Filled while responses arrive. Times in seconds of the monotonic clock."""

    started_s: float
    ended_s: float = 0.0
    texts: dict[int, str] = field(default_factory=dict)  # by sequence
    reasons: dict[int, list[str]] = field(default_factory=dict)  # finish reasons by sequence: exactly one of each
    num_responses: int = 0
    num_finals: int = 0  # responses that Triton marks as the last; gRPC only
    num_after_final: int = 0
    num_stop_replies: int = 0  # to the request that stops this one
    error: str | None = None
    status: int = 0  # of HTTP
    has_left: bool = False  # the client went before the end
    has_hung: bool = False

    def add(self, sequence: int, text: str, reason: str | None) -> None:
        self.texts[sequence] = self.texts.get(sequence, "") + text
        if reason is not None:
            self.reasons.setdefault(sequence, []).append(reason)
