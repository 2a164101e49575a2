"""How often a stream is told its news.

Every response costs processor time, most of it in the server. Where the engine computes on the same cores, that time is
missing in its steps: so responses may take a share of the cores and no more, and the tokens of a stream that come
faster are joined. A stream's first token and its last never wait.
"""

from __future__ import annotations

import os

from pageflight.core.errors import ConfigError

SHARE = 0.1
"""Of the cores, for sending."""
RESPONSE_COST_S = 0.5e-3
"""In stub, server and client together, of a small streamed response (perf/LOG.md)."""
MAX_INTERVAL_S = 0.1
"""However many streams there are, readers should not see their text stutter."""
HOLD_LIMIT_S = 0.2
"""No text is kept back for longer, should its stream stand still."""


class Pacing:
    """`responses_per_s` of all streams together; 0 means what `SHARE` of the cores can send, None no limit."""

    def __init__(self, responses_per_s: int | None) -> None:
        if responses_per_s is not None and responses_per_s < 0:
            raise ConfigError(f"response_rate={responses_per_s}: must be at least 0 (0 follows the number of cores)")
        rate = SHARE * len(os.sched_getaffinity(0)) / RESPONSE_COST_S if responses_per_s == 0 else responses_per_s
        self._ns_per_stream = 0.0 if rate is None else 1e9 / rate

    def interval_ns(self, num_streams: int) -> int:
        """The least time between two responses of one of so many streams."""
        return min(int(num_streams * self._ns_per_stream), int(MAX_INTERVAL_S * 1e9))
