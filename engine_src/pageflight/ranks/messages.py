"""What the first rank and the others tell each other beside plans: msgpack, one message each."""

from __future__ import annotations

from zlib import crc32

import msgspec

from pageflight.core.config import EngineConfig
from pageflight.core.plan import StepResult
from pageflight.models.stages import Place


class RankSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank loads, and where it meets the others: at `port` of `host`, both the first rank's.

    `engine_dir` is the first rank's; wherever a rank has its own, the manifest must have `manifest_digest`. All compute
    on a `device` of one kind, "cuda" or "cpu".
    """

    engine_dir: str
    manifest_digest: str
    config: EngineConfig
    place: Place
    device: str
    host: str
    port: int
    num_threads: int
    num_instances: int


class Present(msgspec.Struct, tag=1, array_like=True, frozen=True):
    """The process has what it was told to load, and the device for it, and is about to meet the others."""


class Computed(msgspec.Struct, tag=2, array_like=True, frozen=True):
    """What came of a step, and for how many seconds the rank has computed so far, where it knows."""

    step: int
    digest: int
    busy_s: float = 0.0


class Failed(msgspec.Struct, tag=3, array_like=True, frozen=True):
    """Last words."""

    error: str  # class name
    message: str


FromRank = Present | Computed | Failed
encode = msgspec.msgpack.Encoder().encode
decode_from_rank = msgspec.msgpack.Decoder[FromRank](FromRank).decode
decode_spec = msgspec.msgpack.Decoder(RankSpec).decode


def digest_of(result: StepResult) -> int:
    """Of everything that a step brought."""
    digest = crc32(result.sampled_ids.tobytes())
    for array in (result.log_probs, result.broken):
        digest = crc32(b"" if array is None else array.tobytes(), digest)
    return digest
