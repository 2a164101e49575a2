"""Plans on their way to other ranks: one small message each, msgpack with arrays as bytes.

The rows of a decode step are usually those of the step before, the very same arrays: they travel once.
"""

from __future__ import annotations

from dataclasses import fields

import msgspec
import numpy as np
from numpy.typing import NDArray

from pageflight.core.plan import RowStart, StepPlan
from pageflight.core.request import SamplingParams

_CHANGES = tuple(item.name for item in fields(StepPlan) if item.default is None)
"""Arrays of int32 that most plans do without."""


class StartFrame(msgspec.Struct, array_like=True, frozen=True):
    """A `RowStart`."""

    row: int
    handle: int
    sequence_index: int
    token_ids: bytes
    num_prompt: int
    sampling: SamplingParams


class PlanFrame(msgspec.Struct, array_like=True, frozen=True):
    """A `StepPlan`. None: the array of the plan before."""

    step: int
    starts_at: bytes
    rows: bytes | None
    lengths: bytes | None
    samples: bytes | None
    starts: tuple[StartFrame, ...]
    ended_rows: tuple[int, ...]
    changes: dict[str, bytes]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(PlanFrame).decode


class PlanEncoder:
    """Makes messages of successive plans, which one PlanDecoder reads."""

    def __init__(self) -> None:
        self._sent: dict[str, object] = {}

    def message(self, plan: StepPlan) -> bytes:
        starts = (
            StartFrame(s.row, s.handle, s.sequence_index, _bytes(s.token_ids), s.num_prompt, s.sampling)
            for s in plan.starts
        )
        changes = {name: getattr(plan, name) for name in _CHANGES}
        return _encode(
            PlanFrame(
                plan.step,
                _bytes(plan.starts_at),
                self._news("rows", plan.rows),
                self._news("lengths", plan.lengths),
                self._news("samples", plan.samples, np.bool_),
                tuple(starts),
                plan.ended_rows,
                {name: _bytes(array) for name, array in changes.items() if array is not None},
            )
        )

    def _news(self, name: str, array: NDArray[np.generic], dtype: type[np.generic] = np.int32) -> bytes | None:
        """Nothing for an array that has been sent and that nobody can have changed since."""
        if array is self._sent.get(name):
            return None
        self._sent[name] = None if array.flags.writeable else array
        return _bytes(array, dtype)


class PlanDecoder:
    """The inverse of `PlanEncoder`. Arrays that did not travel are the very same again."""

    def __init__(self) -> None:
        self._rows = self._lengths = np.zeros(0, np.int32)
        self._samples = np.zeros(0, np.bool_)

    def plan(self, message: bytes) -> StepPlan:
        frame = _decode(message)
        if frame.rows is not None:
            self._rows = np.frombuffer(frame.rows, np.int32)
        if frame.lengths is not None:
            self._lengths = np.frombuffer(frame.lengths, np.int32)
        if frame.samples is not None:
            self._samples = np.frombuffer(frame.samples, np.bool_)
        return StepPlan(
            step=frame.step,
            rows=self._rows,
            starts_at=np.frombuffer(frame.starts_at, np.int32),
            lengths=self._lengths,
            samples=self._samples,
            starts=tuple(map(_row_start, frame.starts)),
            ended_rows=frame.ended_rows,
            **{name: np.frombuffer(data, np.int32) for name, data in frame.changes.items()},
        )


def _row_start(s: StartFrame) -> RowStart:
    ids = np.frombuffer(s.token_ids, np.int32)
    return RowStart(s.row, s.handle, s.sequence_index, ids, s.num_prompt, s.sampling)


def _bytes(array: NDArray[np.generic], dtype: type[np.generic] = np.int32) -> bytes:
    return np.ascontiguousarray(array, dtype).tobytes()
