"""A core's run as a file: configuration, every call of the scheduler with its times, every plan, every sampled id.

A file is a line of magic and then frames: length and CRC-32 of what follows (two little-endian uint32), then a msgpack
array of entries, the first of all a `Header`. What repeats from plan to plan is left out: the rows, lengths and flags
of a decode step are those of the one before, and its positions are one further. What is left are the sampled ids, which
take two bytes each where the vocabulary allows; compressing them would cost more time than it saves space.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from hashlib import blake2b
from operator import attrgetter, is_not
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from pageflight.core.config import EngineConfig
from pageflight.core.plan import Finished, RowStart, StepPlan, StepResult

MAGIC = b"pageflight recording 1\n"
FRAME_HEAD_BYTES = 8

Int32Array = NDArray[np.int32]


class Header(msgspec.Struct, tag=0, array_like=True, frozen=True, kw_only=True):
    """Everything a scheduler is made of, and whose run this was."""

    version: str = ""
    pid: int = 0
    instance: int = 0
    started_ns: int = 0  # of the Unix epoch
    engine_dir: str = ""  # empty: a fake engine
    num_instances: int = 1
    config: EngineConfig  # resolved
    vocab_size: int

    @property
    def id_type(self) -> type[np.generic]:
        """Of the sampled ids in the file."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.int32


class Called(msgspec.Struct, tag=1, array_like=True, frozen=True):
    """A call that is neither `plan` nor `settle`, with what it returned or raised."""

    name: str
    arguments: dict[str, Any]
    returned: Any = None
    raised: str = ""


class Planned(msgspec.Struct, tag=2, array_like=True, frozen=True):
    """A call of `plan`. None: as in the plan before; `steps_on`: positions minus those of the plan before."""

    now_s: float
    step: int = -1  # no plan: nothing could run
    rows: bytes | None = None
    starts_at: bytes | None = None
    steps_on: bytes | None = None
    lengths: bytes | None = None
    samples: bytes | None = None
    rest: dict[str, Any] = {}
    raised: str = ""


class Settled(msgspec.Struct, tag=3, array_like=True, frozen=True):
    """A call of `settle` for the oldest plan that was not settled."""

    now_s: float
    ids: bytes  # `Header.id_type` [L]
    log_probs: bytes | None = None  # float32 [L]
    broken: bytes | None = None  # bool [L]
    finished: tuple[Finished, ...] = ()
    raised: str = ""


class Died(msgspec.Struct, tag=4, array_like=True, frozen=True):
    """The last entry of a core that ended by an error."""

    message: str


Entry = Header | Called | Planned | Settled | Died

_CHUNKS = ("step", "rows", "starts_at", "lengths", "samples")
_REST = tuple(item.name for item in fields(StepPlan) if item.name not in _CHUNKS)
_EMPTY = tuple(item.default for item in fields(StepPlan) if item.name not in _CHUNKS)
_rest_values = attrgetter(*_REST)


def _bytes_of(value: object) -> bytes:
    if isinstance(value, np.ndarray):
        return value.tobytes()
    raise TypeError(f"{type(value).__name__} cannot be recorded")


encode = msgspec.msgpack.Encoder(enc_hook=_bytes_of).encode
_decoder = msgspec.msgpack.Decoder(list[Entry])


def encode_frame(entries: list[bytes]) -> bytes:
    """What stands in a frame, before it is compressed: an array of encoded entries."""
    return b"\xdd" + len(entries).to_bytes(4, "big") + b"".join(entries)


def decode_frame(data: bytes) -> list[Entry]:
    """Raises msgspec.DecodeError."""
    return _decoder.decode(data)


def rest_of(plan: StepPlan) -> dict[str, Any]:
    """What a plan says beside its chunks, arrays as bytes; fields that say nothing are left out.

    Of a start's tokens and wishes, which the recorded request has in full, only their number and a digest remain.
    """
    values = _rest_values(plan)
    if not any(map(is_not, values, _EMPTY)):
        return {}
    rest: dict[str, Any] = {}
    for name, value, empty in zip(_REST, values, _EMPTY, strict=True):
        if value is not empty:
            rest[name] = value.tobytes() if isinstance(value, np.ndarray) else value
    if "starts" in rest:
        rest["starts"] = [_short_start(start) for start in plan.starts]
    return rest


def _short_start(start: RowStart) -> dict[str, Any]:
    short = {item.name: getattr(start, item.name) for item in fields(start)}
    digest = blake2b(start.token_ids.tobytes() + encode(start.sampling), digest_size=8).hexdigest()
    return {**short, "token_ids": len(start.token_ids), "sampling": digest}


def settled_entry(
    id_type: type[np.generic], now_s: float, result: StepResult, finished: tuple[Finished, ...], raised: str
) -> Settled:
    log_probs, broken = result.log_probs, result.broken
    return Settled(
        now_s,
        result.sampled_ids.astype(id_type).tobytes(),
        None if log_probs is None else log_probs.astype(np.float32, copy=False).tobytes(),
        None if broken is None else broken.tobytes(),
        finished,
        raised,
    )


class PlanEncoder:
    """Successive plans as entries that hold only what is not as in the plan before."""

    def __init__(self) -> None:
        self._rows = self._lengths = self._samples = b""
        self._steps_on: bytes | None = None
        self._starts_at: Int32Array = np.zeros(0, np.int32)

    def entry(self, now_s: float, plan: StepPlan) -> Planned:
        rows, lengths, samples = plan.rows.tobytes(), plan.lengths.tobytes(), plan.samples.tobytes()
        same_rows, starts_at, steps_on = rows == self._rows, None, None
        if same_rows:
            gone = (plan.starts_at - self._starts_at).tobytes()
            if gone != self._steps_on:
                self._steps_on = steps_on = gone
        else:
            self._steps_on, starts_at = None, plan.starts_at.tobytes()
        entry = Planned(
            now_s,
            plan.step,
            None if same_rows else rows,
            starts_at,
            steps_on,
            None if lengths == self._lengths else lengths,
            None if samples == self._samples else samples,
            rest_of(plan),
        )
        self._rows, self._starts_at, self._lengths, self._samples = rows, plan.starts_at, lengths, samples
        return entry


@dataclass(frozen=True, slots=True, eq=False)
class RecordedPlan:
    """A plan as it was recorded, whole again. `rest`: see `rest_of`."""

    step: int
    rows: Int32Array
    starts_at: Int32Array
    lengths: Int32Array
    samples: NDArray[np.bool_]
    rest: dict[str, Any]


class PlanDecoder:
    """The inverse of `PlanEncoder`."""

    def __init__(self) -> None:
        self._rows: Int32Array = np.zeros(0, np.int32)
        self._starts_at = self._lengths = self._steps_on = self._rows
        self._samples: NDArray[np.bool_] = np.zeros(0, np.bool_)

    def plan(self, entry: Planned) -> RecordedPlan | None:
        """None where nothing could run."""
        if entry.step < 0:
            return None
        if entry.rows is not None:
            self._rows = np.frombuffer(entry.rows, np.int32)
        if entry.steps_on is not None:
            self._steps_on = np.frombuffer(entry.steps_on, np.int32)
        if entry.starts_at is not None:
            self._starts_at = np.frombuffer(entry.starts_at, np.int32)
        else:
            self._starts_at = self._starts_at + self._steps_on
        if entry.lengths is not None:
            self._lengths = np.frombuffer(entry.lengths, np.int32)
        if entry.samples is not None:
            self._samples = np.frombuffer(entry.samples, np.bool_)
        return RecordedPlan(entry.step, self._rows, self._starts_at, self._lengths, self._samples, entry.rest)
