"""How long a step will take, learnt from the steps before it."""

from __future__ import annotations

import math
from collections import deque
from heapq import nlargest
from typing import NamedTuple


class Load(NamedTuple):
    """What the time of a step is made of."""

    num_rows: int  # that decode
    num_positions: int  # whose K/V they read
    num_tokens: int  # of the whole step, counted in whole tiles once it fills one
    num_pairs: float  # tokens of prompt chunks × the positions that each attends to


class StepCosts(NamedTuple):
    """Seconds of any step, and per unit of each part of its `Load`."""

    step_s: float
    row_s: float
    position_s: float
    token_s: float
    pair_s: float

    def of(self, load: Load) -> float:
        """Seconds of a step with this load."""
        decoding_s = self.row_s * load.num_rows + self.position_s * load.num_positions
        return self.step_s + decoding_s + self.token_s * load.num_tokens + self.pair_s * load.num_pairs


MAX_MARGIN = 2.0
"""A step that took longer than so many times its prediction was disturbed by something else."""

_MEMORY = 1 - 1 / 64  # weight of the steps before against a step of the same kind
_NUM_RATIOS = 256
_RIDGE = 1e-4
_NUM_PARTS = len(StepCosts._fields)

Matrix = list[list[float]]


class StepTime:
    """A linear model of step time: least squares of the relative errors of recent steps, with costs ≥ 0.

    Steps with prompt chunks and steps without fade apart, so that a long time of one kind does not wipe out what is
    known of the other. Plain arithmetic on floats: the same times give the same predictions on every machine.
    """

    def __init__(self) -> None:
        # Normal equations of steps without and with chunks: parts ÷ seconds, times each other, and times 1.
        self._sums: list[Matrix] = [[[0.0] * (_NUM_PARTS + 1) for _ in range(_NUM_PARTS)] for _ in range(2)]
        self._ratios: deque[float] = deque(maxlen=_NUM_RATIOS)  # actual ÷ predicted seconds of steps with chunks
        self._costs: StepCosts | None = None
        self._is_stale = False

    def note(self, load: Load, seconds: float) -> None:
        """A step with this load took so long."""
        if seconds <= 0:
            return
        expected_s = self._costs.of(load) if self._costs is not None else 0.0
        if expected_s > 0:
            if load.num_pairs:
                self._ratios.append(seconds / expected_s)
            seconds = min(seconds, MAX_MARGIN * expected_s)
        parts = [part / seconds for part in (1.0, *load)]
        sums = self._sums[load.num_pairs > 0]
        for row, part in zip(sums, parts, strict=True):
            row[:] = [_MEMORY * known + part * other for known, other in zip(row, (*parts, 1.0), strict=True)]
        self._is_stale = True

    def costs(self) -> StepCosts | None:
        """What fits the steps noted so far; None before there was one with a prompt chunk."""
        if self._is_stale and self._sums[1][0][0]:
            plain, mixed = self._sums
            self._costs = _fit([[a + b for a, b in zip(*rows, strict=True)] for rows in zip(plain, mixed, strict=True)])
            self._is_stale = False
        return self._costs

    def margin(self) -> float:
        """Times its prediction that one step with chunks in a hundred took longer than, from 1 to `MAX_MARGIN`."""
        longest = nlargest(1 + len(self._ratios) // 100, self._ratios)
        return min(max(1.0, longest[-1]), MAX_MARGIN) if longest else 1.0


def _fit(sums: Matrix) -> StepCosts:
    """Solve the normal equations; parts whose cost would be negative are left out, the most negative first."""
    used = [index for index in range(_NUM_PARTS) if sums[index][index] > 0]
    while True:
        scales = [math.sqrt(sums[index][index]) for index in used]
        matrix = [
            [sums[i][j] / (a * b) + _RIDGE * (i == j) for j, b in zip(used, scales, strict=True)]
            + [sums[i][_NUM_PARTS] / a]
            for i, a in zip(used, scales, strict=True)
        ]
        costs = [value / scale for value, scale in zip(_solve(matrix), scales, strict=True)]
        worst = min(range(len(used)), key=lambda index: costs[index] * scales[index])
        if costs[worst] >= 0 or len(used) == 1:
            break
        del used[worst]
    found = dict(zip(used, costs, strict=True))
    return StepCosts(*(max(0.0, found.get(index, 0.0)) for index in range(_NUM_PARTS)))


def _solve(matrix: Matrix) -> list[float]:
    """Solve a symmetric positive definite system, its right side the last column, by elimination."""
    size = len(matrix)
    for pivot in range(size):
        for row in range(pivot + 1, size):
            factor = matrix[row][pivot] / matrix[pivot][pivot]
            matrix[row] = [a - factor * b for a, b in zip(matrix[row], matrix[pivot], strict=True)]
    values = [0.0] * size
    for row in reversed(range(size)):
        known = sum(matrix[row][column] * values[column] for column in range(row + 1, size))
        values[row] = (matrix[row][size] - known) / matrix[row][row]
    return values
