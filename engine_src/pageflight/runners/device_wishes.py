"""What rows ask of sampling, on the device: parameters, and the lists and counts of those rows that have any.

R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pageflight.core.plan import RowStart, StepPlan
from pageflight.kernels.sampling import packed
from pageflight.kernels.sampling_adjust import packed_counts, packed_lists
from pageflight.kernels.step_inputs import scatter
from pageflight.sampling.adjustments import has_penalties

Int32Array = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Wishes:
    """Of one row: lines of `RowParameters` in words, and the tensors whose addresses are in them."""

    floats: Int32Array
    integers: Int32Array
    lists: Tensor | None
    counts: Tensor | None


class RowWishes:
    """Wishes by row. Memory for lists and counts is taken when a row starts that has such, and given back at its end:
    what runs on the same stream later may have it."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device, *, samples: bool = True) -> None:
        """`samples` False: another stage does, and has lists and counts."""
        self._samples = samples
        self._vocab_size, self._device = vocab_size, device
        self._held_R: list[Wishes | None] = [None] * max_num_seqs
        self._filters_R, self._adjusts_R, self._log_probs_R = np.zeros((3, max_num_seqs), np.bool_)

    def prepared(self, plan: StepPlan) -> list[Wishes]:
        """Wishes of the rows that the plan starts, with their memory. Changes nothing here."""
        return [self._prepared(start) for start in plan.starts]

    def change(self, plan: StepPlan, prepared: Sequence[Wishes]) -> None:
        """Rows that end, then rows that start with what was `prepared` for them."""
        for row in plan.ended_rows:
            self._held_R[row] = None
        for start, wishes in zip(plan.starts, prepared, strict=True):
            sampling, row = start.sampling, start.row
            self._held_R[row] = wishes
            self._filters_R[row] = self._samples and (
                sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0
            )
            self._adjusts_R[row] = wishes.lists is not None or wishes.counts is not None
            self._log_probs_R[row] = sampling.log_probs

    def kinds_of(self, rows_L: Int32Array) -> tuple[bool, bool]:
        """(whether one draws among a part of the vocabulary, whether one has lists or counts)."""
        return bool(self._filters_R[rows_L].any()), bool(self._adjusts_R[rows_L].any())

    def log_probs_of(self, rows_L: Int32Array) -> NDArray[np.bool_]:
        """Which asked for log probabilities."""
        return self._log_probs_R[rows_L]

    def _prepared(self, start: RowStart) -> Wishes:
        sampling = start.sampling
        on_host = packed_lists(sampling, start.num_prompt, self._vocab_size) if self._samples else None
        lists = None if on_host is None else copied(on_host, self._device)
        counts = None
        if self._samples and has_penalties(sampling):
            ids, times = (copied(part, self._device) for part in packed_counts(start.token_ids, start.num_prompt))
            counts = torch.zeros(self._vocab_size, dtype=torch.int32, device=self._device)
            scatter(counts, ids, times)
        lines = packed(sampling, start.sequence_index, lists=lists, counts=counts)
        floats, integers = (line.numpy().view(np.int32) for line in lines)
        return Wishes(floats, integers, lists, counts)


def wishes_bytes(num_rows: int, vocab_size: int) -> int:
    """Most memory of adjusted scores and of counts, if every row has penalties: four bytes an id each."""
    return 2 * 4 * num_rows * vocab_size


def copied(array: Int32Array, device: torch.device) -> Tensor:
    """The same on the device, once the current stream gets there."""
    on_host = torch.from_numpy(np.ascontiguousarray(array, np.int32))
    if device.type == "cuda":  # from other memory the copy would wait for the steps in flight
        on_host = on_host.pin_memory()
    return on_host.to(device, non_blocking=True)
