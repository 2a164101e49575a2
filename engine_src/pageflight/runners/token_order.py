"""Which micro-batch of a pipeline brings the last token of each row: who reads a row waits for that one only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pageflight.core.plan import StepPlan
from pageflight.runners.micro_batches import MicroBatch

Int32Array = NDArray[np.int32]


class TokenOrder:
    """Of one stage, told of plans and micro-batches in their order. Micro-batches are numbered from 1."""

    def __init__(self, max_num_seqs: int) -> None:
        self._sampled_in_R = np.zeros(max_num_seqs, np.int64)  # 0: the row's tokens are all here
        self._number = 0

    def change(self, plan: StepPlan) -> None:
        """Rows that end or start wait for nothing: what is sampled for whoever had them is nobody's."""
        self._sampled_in_R[[*plan.ended_rows, *(start.row for start in plan.starts)]] = 0

    def computed(self, batch: MicroBatch) -> int:
        """The number of a micro-batch that this stage has computed: rows that sample in it wait for its ids."""
        self._number += 1
        self._sampled_in_R[batch.plan.rows[batch.plan.samples]] = self._number
        return self._number

    def wanted(self, rows: Int32Array) -> int:
        """The micro-batch up to which ids must be here before `rows` run; 0: none is missing."""
        return int(self._sampled_in_R[rows].max(initial=0))

    def is_theirs(self, number: int, rows_L: Int32Array) -> NDArray[np.bool_]:
        """For which of `rows_L` an id of micro-batch `number` is the next token: nobody has begun in them since."""
        found: NDArray[np.bool_] = self._sampled_in_R[rows_L] == number
        return found
