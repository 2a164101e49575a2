"""What travels between fronts and core: msgpack arrays, one frame per step and front.

Front → core: `Connect` (on the events socket), `Submit`, `Cancel`, `Leave`. Core → front: `Hello`, `StepFrame`,
`StatsFrame`, `Rejected`, `Beat`. Every command carries the core's `epoch` (from its `Hello`) and every frame is stamped
with it: what was meant for, or said by, a core that has died is recognised and dropped.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from pageflight.core import errors
from pageflight.core.errors import InvalidArgument, PageflightError
from pageflight.core.plan import Finished
from pageflight.core.request import Request
from pageflight.core.stats import CoreStats

PROTOCOL = 3
"""Version of these frames: a front and a core of different versions refuse each other."""


class Connect(msgspec.Struct, tag=1, array_like=True, frozen=True):
    """A front introduces itself over a new connection; answered by `Hello`. Its sequences of an older one end."""

    protocol: int
    front: bytes  # identity of its events socket
    pid: int


class Submit(msgspec.Struct, tag=2, array_like=True, frozen=True):
    epoch: int
    front: bytes
    request: Request  # its handle counts in the front's own numbers


class Cancel(msgspec.Struct, tag=3, array_like=True, frozen=True):
    epoch: int
    front: bytes
    handles: tuple[int, ...]
    by_client: bool = True  # False: the front found a stop string


class Leave(msgspec.Struct, tag=4, array_like=True, frozen=True):
    """The front is going; all its sequences end."""

    epoch: int
    front: bytes


class CoreLimits(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """What a front must know of the core to refuse early what can never work."""

    max_model_len: int
    num_blocks: int
    block_size: int
    vocab_size: int
    max_num_seqs: int
    max_queue_size: int


class Hello(msgspec.Struct, tag=11, array_like=True, frozen=True):
    protocol: int
    epoch: int
    pid: int
    limits: CoreLimits
    front_base: int
    """What the core adds to this front's handles to make them its own."""


class StepFrame(msgspec.Struct, tag=12, array_like=True, frozen=True):
    """News of one front's sequences from one settled step, or from several when the front was behind."""

    epoch: int
    step: int
    handles: bytes  # int64 [L]
    ids: bytes  # int32 [L]
    log_probs: bytes | None  # float32 [L]
    finished: list[Finished]


class StatsFrame(msgspec.Struct, tag=13, array_like=True, frozen=True):
    """A few times a second while steps run."""

    epoch: int
    stats: CoreStats


class Rejected(msgspec.Struct, tag=14, array_like=True, frozen=True):
    """The request with this first handle never became sequences."""

    epoch: int
    handle: int
    error: str  # class name
    message: str


class Beat(msgspec.Struct, tag=15, array_like=True, frozen=True):
    """The sign of life of a core between two steps, idle or not, a few times a second."""

    epoch: int
    num_taken: int
    """So many of this front's requests have been taken in, or refused, since `Hello`, in the order they were sent."""


FromFront = Connect | Submit | Cancel | Leave
FromCore = Hello | StepFrame | StatsFrame | Rejected | Beat

encode = msgspec.msgpack.Encoder().encode
_from_front: msgspec.msgpack.Decoder[FromFront] = msgspec.msgpack.Decoder(FromFront)
_from_core: msgspec.msgpack.Decoder[FromCore] = msgspec.msgpack.Decoder(FromCore)


class BadFrame(Exception):
    """Bytes that are no frame of this protocol."""


def decode_from_front(data: bytes) -> FromFront:
    """Raises BadFrame."""
    try:
        return _from_front.decode(data)
    except msgspec.DecodeError as error:
        raise BadFrame(str(error)) from None


def decode_from_core(data: bytes) -> FromCore:
    """Raises BadFrame."""
    try:
        return _from_core.decode(data)
    except msgspec.DecodeError as error:
        raise BadFrame(str(error)) from None


_ERRORS = {cls.__name__: cls for cls in errors.STATUS}


def error_from_wire(name: str, message: str) -> PageflightError:
    """The typed error that another process named; its class decides the wire status, its message is kept as it is."""
    cls = _ERRORS.get(name, PageflightError)
    error = cls.__new__(cls)
    error.args = (message,)
    if isinstance(error, InvalidArgument):
        option, _, rest = message.partition("=")
        error.option, (error.value, _, error.limit) = option, rest.partition(": ")
    return error


def error_to_wire(error: BaseException) -> tuple[str, str]:
    """Class name and message. A foreign exception travels as a PageflightError that names its class."""
    if isinstance(error, PageflightError):
        return type(error).__name__, str(error)
    return PageflightError.__name__, f"{type(error).__name__}: {error}"


def int64_of(data: bytes) -> NDArray[np.int64]:
    return np.frombuffer(data, dtype=np.int64)


def int32_of(data: bytes) -> NDArray[np.int32]:
    return np.frombuffer(data, dtype=np.int32)


def float32_of(data: bytes) -> NDArray[np.float32]:
    return np.frombuffer(data, dtype=np.float32)
