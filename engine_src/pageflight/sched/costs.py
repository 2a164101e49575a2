"""What computing a token and copying a block cost, from the times of the steps that were settled."""

from __future__ import annotations

_MEMORY = 0.95  # weight of what was known before a step against the step


class Costs:
    """`copy_s` is the time of copying one block between device and host, one way, as the runner measured it.

    A prompt token costs what it adds to a step: the decoding rows beside it would have run anyway. Everything follows
    from the times passed in.
    """

    def __init__(self, copy_s: float, block_size: int) -> None:
        self.copy_s = copy_s
        self.block_size = block_size
        self._seconds = self._tokens = 0.0  # of prompts, of late
        self._decode_s: float | None = None  # of a step that only decodes, of late
        self._settled_s = float("-inf")

    @property
    def token_s(self) -> float | None:
        """Seconds to compute a prompt token; None until one was."""
        return self._seconds / self._tokens if self._tokens else None

    def settle(self, planned_s: float, now_s: float, num_context_tokens: int, num_generation_rows: int) -> None:
        """A step that was planned at `planned_s` has ended. It could not begin before the one before had ended."""
        duration_s = max(0.0, now_s - max(planned_s, self._settled_s))
        self._settled_s = now_s
        if not num_context_tokens:
            before_s = duration_s if self._decode_s is None else self._decode_s
            self._decode_s = _MEMORY * before_s + (1 - _MEMORY) * duration_s
            return
        if num_generation_rows and self._decode_s is not None:
            duration_s = max(0.0, duration_s - self._decode_s)
        self._seconds = _MEMORY * self._seconds + duration_s
        self._tokens = _MEMORY * self._tokens + num_context_tokens

    def is_copying_cheaper(self, num_copies: int, num_tokens: int) -> bool:
        """Whether to copy so many blocks rather than compute so many tokens. Copying, while neither is known."""
        token_s = self.token_s
        return token_s is None or num_copies * self.copy_s < num_tokens * token_s

    def saved_s(self, num_tokens: int, num_copies: int) -> float:
        """Seconds that finding `num_tokens` computed has saved, of which `num_copies` blocks had to be copied."""
        return max(0.0, num_tokens * (self.token_s or 0.0) - num_copies * self.copy_s)
