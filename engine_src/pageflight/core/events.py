"""What the front tells whoever asked: one stream of events per sequence, the last of them final."""

from __future__ import annotations

from dataclasses import dataclass

from pageflight.core.errors import PageflightError


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Counts and times of a finished sequence. Times are nanoseconds of the Unix epoch; 0 where it never got there."""

    num_input_tokens: int
    num_output_tokens: int
    cum_log_prob: float = 0.0
    num_cached_tokens: int = 0
    num_reused_blocks: int = 0
    num_new_blocks: int = 0
    arrival_ns: int = 0
    first_scheduled_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """News of one sequence: the new ids and the text they complete. `final` comes exactly once, with `usage`.

    `text` never holds part of a character or of a stop string. `finish_reason` is stop, length, cancelled, deadline or
    error; `error` is set for the reasons that are errors on the wire.
    """

    sequence_index: int
    text: str = ""
    ids: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    final: bool = False
    finish_reason: str | None = None
    error: PageflightError | None = None
    usage: Usage | None = None
