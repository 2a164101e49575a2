"""When a waiting sequence may have its first blocks: what must stay free for those that run, and for its own growth."""

from __future__ import annotations

import math

import numpy as np

from pageflight.core.config import SchedulerConfig
from pageflight.kv.capacity import blocks_for
from pageflight.sched.forecast import Forecast
from pageflight.sched.kv_space import KVSpace
from pageflight.sched.rows import Rows
from pageflight.sched.sequence import Sequence


class Headroom:
    """The setting `kv_admission`.

    `optimistic` asks for a block for every row that will need another, and for the watermark. `reserve` asks for all
    that could be needed. `forecast` asks for what the optimist does, and that the most that is likely to be held at any
    time fits: in the cache, or beyond it in the host tier, where sequences that are preempted lose little.
    """

    def __init__(self, config: SchedulerConfig, rows: Rows, space: KVSpace) -> None:
        self._config, self._rows, self._space = config, rows, space
        self._watermark = int(config.kv_watermark * space.pool.num_blocks)
        self._forecast = Forecast(space.block_size)

    def learn(self, sequence: Sequence) -> None:
        """`sequence` has ended with these tokens."""
        if sequence.was_scheduled:
            self._forecast.learn(len(sequence.tokens) - sequence.num_prompt)

    def of(self, sequence: Sequence, num_new: int) -> int:
        """Blocks that must stay free beside the `num_new` first ones of `sequence`."""
        if not self._rows.num_held:
            return self.reserved(sequence)
        headroom = max(self._rows.num_growing(), self._watermark, self.reserved(sequence))
        if self._config.kv_admission == "forecast" and self._space.pool.num_free - num_new >= headroom:
            headroom = max(headroom, self._expected(sequence, num_new))
        return headroom

    def reserved(self, sequence: Sequence) -> int:
        """Blocks that `sequence` and the running ones may come to need; 0 where nothing is reserved."""
        if self._config.kv_admission != "reserve":
            return 0
        size = self._space.block_size
        own = blocks_for(sequence.max_len - 1, size) - blocks_for(len(sequence.tokens), size)
        return self._rows.num_missing() + own

    def _expected(self, sequence: Sequence, num_new: int) -> int:
        """Blocks that `sequence` and the running ones are likely to need at their worst; fewer if the host has room.

        What they found computed counts once, as held for good.
        """
        rows, space = self._rows, self._space
        held = rows.held()
        shared_R = rows.num_shared[held]
        tokens_R = np.append(rows.num_known[held] - shared_R * space.block_size, num_new * space.block_size)
        serials_R = np.append(rows.serials[held], sequence.rank[1])
        done_R = np.append(rows.num_known[held] - rows.num_prompt[held], len(sequence.tokens) - sequence.num_prompt)
        limit_R = np.append(rows.max_len[held] - rows.num_prompt[held], sequence.request.sampling.max_tokens)
        peak = self._forecast.peak_blocks(tokens_R, self._forecast.remaining(serials_R, done_R, limit_R))
        num_used = space.pool.num_blocks - space.pool.num_free
        num_shared = max(0, num_used - int((rows.num_blocks[held] - shared_R).sum()))
        return self._watermark + math.ceil(peak) + num_shared - num_used - num_new - space.num_swappable()
