"""What a TensorRT engine directory says beside its engines: segments, their tensors, and the order they run in.

Standard library only: the program that runs the engines reads this, whatever it uses for it.

    weights ─► first ─► attention 0 ─► mid ─► attention 1 ─► … ─► mid ─► attention N-1 ─► last ─► logits

Attention runs between segments, over blocks that are not TensorRT's: it takes `q`, `k` and `v` of the segment before,
already rotated and not yet divided by √D, writes k and v into the blocks and gives `attended` to the segment after.

One of several ranks has sums over all of them as well, which by default cut segments too (A: attention, Σ: a sum):

    embed ─Σ─► first ─A─► output ─Σ─► mlp ─Σ─► mid ─A─► … ─A─► last_output ─Σ─► last_mlp ─Σ─► last ─► its logits

Shapes: T packed tokens of a step, L rows that sample, D head_dim. A tensor's shape names them where they stand.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from pageflight.core.errors import ManifestMismatch

PLAN_NAME = "segments.json"
FORMAT_VERSION = 1
TOKENS, ROWS = "T", "L"
Dimension = int | str
Record = TypeVar("Record")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """An input or output of an engine.

    `dtype`: fp32, fp16, bf16, fp8, int8, int4 (two per byte, the even column in the low half) or int32. `kind`: `step`,
    set for every step; `activation`, from one segment to the next or from and to attention; `weight`, set once;
    `table`, set once: `rope.cosines` and `rope.sines` are the first D / 2 columns of `models.rope.rope_tables`.

    Of several ranks: `ids` count from the first row of the embedding that a rank has; those that others have are 0, and
    so is then `here`, which is 1 for its own.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[Dimension, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Optimisation profile of every segment, by its place in the list: 1 ≤ `min_tokens` ≤ T ≤ `max_tokens`.

    L is from 1 to `max_rows`. Profiles are tuned for their `max_tokens`: the first one that takes a decode step is the
    best for it. The last one is for steps with prompt chunks, whatever their size.
    """

    name: str
    min_tokens: int
    max_tokens: int
    max_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One engine file. `ranks`: those of several whose part of the weights it takes; none: all."""

    name: str
    file: str
    num_bytes: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One execution of a segment in a step.

    `weights` gives the tensor of model.safetensors for each input of that kind; `buffers` the buffer for each step
    input, and for each activation that comes in or goes out: equal names are the same memory. `attention` is the layer
    whose attention comes next, from buffers q, k and v to buffer attended; -1 where none does. What follows the last
    attention is for rows that sample: steps without any leave it out. `summed` is the buffer that then holds the sum of
    all ranks' before the next run; empty where that is nobody's concern.
    """

    segment: str
    attention: int
    weights: dict[str, str]
    buffers: dict[str, str]
    summed: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """`segments.json`. With several ranks (`tensor_parallel`) weights are a rank's parts of the tensors that are named,
    segments of one name are alike but for sizes, and each rank has one of them. `collectives`: sums over ranks are
    `between` the engines, or layers `inside` them.
    """

    format_version: int = FORMAT_VERSION
    flavor: str  # rtx | full
    compute_capabilities: tuple[int, ...]  # 89 is 8.9; none: any that the flavor supports
    activations: str
    weights: str  # input | constant
    profiles: tuple[Profile, ...]
    segments: tuple[Segment, ...]
    runs: tuple[Run, ...]
    tensor_parallel: int = 1
    collectives: str = "between"

    def of_rank(self, rank: int) -> EnginePlan:
        """With the segments of one rank only."""
        return replace(self, segments=tuple(item for item in self.segments if not item.ranks or rank in item.ranks))

    def write(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=1)
        (folder / PLAN_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> EnginePlan:
        """The plan of an engine directory. Raises ManifestMismatch when it is missing, damaged or another version's."""
        path = folder / PLAN_NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            version = data["format_version"]
            if version != FORMAT_VERSION:
                raise ManifestMismatch(
                    f"{path}: format_version={version!r}, this runtime reads {FORMAT_VERSION}; build the engine again"
                )
            data["compute_capabilities"] = tuple(data["compute_capabilities"])
            data["profiles"] = tuple(_record(Profile, item) for item in data["profiles"])
            data["segments"] = tuple(_segment(item) for item in data["segments"])
            data["runs"] = tuple(_record(Run, item) for item in data["runs"])
            return _record(cls, data)
        except FileNotFoundError:
            raise ManifestMismatch(f"{path} is missing; build the engine again") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ManifestMismatch(f"{path} is damaged ({error!r}); build the engine again") from None


def decode_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes that decode profiles are tuned for: powers of four, and the largest batch."""
    sizes, size = [], 1
    while size < max_num_seqs:
        sizes.append(size)
        size *= 4
    return (*sizes, max_num_seqs)


def profiles(max_num_seqs: int, max_num_tokens: int) -> tuple[Profile, ...]:
    """One per decode bucket, and one for whatever holds prompt chunks."""
    buckets = decode_buckets(min(max_num_seqs, max_num_tokens))
    least = [1, *(size + 1 for size in buckets)]
    decode = [
        Profile(name=f"decode-{most}", min_tokens=low, max_tokens=most, max_rows=most)
        for low, most in zip(least, buckets, strict=False)
    ]
    prefill = Profile(name="prefill", min_tokens=1, max_tokens=max_num_tokens, max_rows=buckets[-1])
    return (*decode, prefill)


def _segment(data: dict[str, Any]) -> Segment:
    specs = {
        side: tuple(_record(TensorSpec, {**item, "shape": tuple(item["shape"])}) for item in data[side])
        for side in ("inputs", "outputs")
    }
    return _record(Segment, {**data, **specs, "ranks": tuple(data.get("ranks", ()))})


def _record(cls: type[Record], data: dict[str, Any]) -> Record:
    unknown = set(data) - {field.name for field in fields(cls)}  # type: ignore[arg-type]
    if unknown:
        raise TypeError(f"unknown entries {sorted(unknown)}")
    return cls(**data)
