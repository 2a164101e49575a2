"""How much of the prompts goes into a step: as much as fits, or as much as keeps the streams that run in time."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pageflight.core.config import SchedulerConfig
from pageflight.sched.rows import Rows
from pageflight.sched.step_time import Load, StepCosts, StepTime

MIN_CHUNK = 16
"""Tokens, where the engine has no tiles. Less would hardly be cheaper."""


class Budget:
    """Tokens that a step has left for prompts."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    @property
    def is_spent(self) -> bool:
        return not self.num_tokens

    def take(self, start: int, num_missing: int) -> int:
        """Length, at least 1, of the chunk of a prompt of which `start` tokens are computed and so many are missing.

        The budget is not spent.
        """
        length = min(self.num_tokens, num_missing)
        self.num_tokens -= length
        return length


class TimedBudget(Budget):
    """A budget that is also spent when the step would take longer than it may.

    The first chunk is never smaller than about a tile: prompts get on, however little time there is. `costs` None:
    nothing is known yet, and no chunk is larger.
    """

    def __init__(
        self, num_tokens: int, *, num_decoding: int, tile: int, left_s: float, costs: StepCosts | None
    ) -> None:
        super().__init__(num_tokens)
        self._total, self._tile, self._left_s, self._costs = num_decoding, tile, left_s, costs
        self._has_chunk = False

    @property
    def is_spent(self) -> bool:
        if not self.num_tokens or not self._has_chunk:
            return not self.num_tokens
        return self._costs is None or self._cost(0, min(self._tile, MIN_CHUNK)) > self._left_s

    def take(self, start: int, num_missing: int) -> int:
        most = min(self.num_tokens, num_missing)
        length = max(1, self._length_in_time(start, most))
        if not self._has_chunk:
            length = max(length, min(most, self._least()))
        self._left_s -= self._cost(start, length)
        self._total += length
        self.num_tokens -= length
        self._has_chunk = True
        return length

    def _least(self) -> int:
        """Tokens that fill the tile they begin, at least half of one."""
        if self._tile == 1:
            return MIN_CHUNK
        length = -self._total % self._tile
        return length if 2 * length >= self._tile else length + self._tile

    def _length_in_time(self, start: int, most: int) -> int:
        costs = self._costs
        if costs is None or self._left_s <= 0:
            return 0
        if self._cost(start, most) <= self._left_s:
            return most
        # left = token_s n + pair_s (start n + n²/2); tiles then cut it down to what fills them.
        linear, square = costs.token_s + costs.pair_s * start, costs.pair_s / 2
        length = most
        if linear or square:
            length = min(most, int(2 * self._left_s / (linear + math.sqrt(linear**2 + 4 * square * self._left_s))))
        length += -(self._total + length) % self._tile
        while length > 0 and (length > most or self._cost(start, length) > self._left_s):
            length -= self._tile
        return max(0, length)

    def _cost(self, start: int, length: int) -> float:
        """Seconds that a chunk adds to the step."""
        if self._costs is None:
            return 0.0
        tokens = in_tiles(self._total + length, self._tile) - in_tiles(self._total, self._tile)
        return self._costs.token_s * tokens + self._costs.pair_s * num_pairs(start, length)


def in_tiles(num_tokens: int, tile: int) -> int:
    """Tokens that an engine pays for: whole tiles, once it fills one."""
    return num_tokens if num_tokens < tile else -(-num_tokens // tile) * tile


def num_pairs(start: int, length: int) -> float:
    """Sum over a chunk's tokens of the positions that each attends to."""
    return length * (start + (length + 1) / 2)


class Pacer:
    """Gives every step its budget. With a target, it learns what steps cost from the times that are passed in."""

    def __init__(self, config: SchedulerConfig, rows: Rows) -> None:
        self._config, self._rows = config, rows
        self._target_s = config.target_inter_token_ms / 1000
        self._model = StepTime()
        self._settled_s = -math.inf

    def budget(self, decode_rows: NDArray[np.int32]) -> Budget:
        """What the step that these rows decode in has left for prompts."""
        num_decoding = len(decode_rows)
        num_tokens = self._config.max_num_tokens - num_decoding
        if not self._target_s or not num_decoding:
            return Budget(num_tokens)
        costs, left_s = self._model.costs(), 0.0
        if costs is not None:
            left_s = self._target_s / self._model.margin() - costs.of(self._load(decode_rows, 0, 0.0))
        return TimedBudget(
            num_tokens, num_decoding=num_decoding, tile=self._config.token_tile, left_s=left_s, costs=costs
        )

    def load(self, decode_rows: NDArray[np.int32], starts: list[int], lengths: list[int]) -> Load | None:
        """What a plan's time will be made of; None where nobody wants to know."""
        if not self._target_s:
            return None
        return self._load(decode_rows, sum(lengths), sum(map(num_pairs, starts, lengths)))

    def settle(self, load: Load | None, planned_s: float, now_s: float) -> None:
        """A step with this load, planned at `planned_s`, has ended.

        Rows that decode wait from one step's end to the next, whatever happens between.
        """
        if load is not None:
            begun_s = self._settled_s if load.num_rows else max(planned_s, self._settled_s)
            self._model.note(load, now_s - begun_s)
        self._settled_s = now_s

    def _load(self, decode_rows: NDArray[np.int32], num_chunk_tokens: int, pairs: float) -> Load:
        num_rows = len(decode_rows)
        return Load(
            num_rows=num_rows,
            num_positions=int(self._rows.num_known[decode_rows].sum()),
            num_tokens=in_tiles(num_rows + num_chunk_tokens, self._config.token_tile),
            num_pairs=pairs,
        )
