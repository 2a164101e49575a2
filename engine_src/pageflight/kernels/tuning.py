"""How products and attention are cut into tiles on each kind of GPU: measured once there, then read from a file.

`configs/<gpu name>.json` holds what was fastest for a kernel, its dtype and a bucket of shapes. Where a card, or a
shape on it, was never measured, each kernel has a default of its own. T tokens.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import triton

from pageflight.kernels.timing import microseconds

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "configs"
_LEAST_BUCKET, _GREATEST_BUCKET = 16, 8192
_ENOUGH_PROGRAMS = 256  # about two for each multiprocessor of a large card


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Tokens × outputs of one program, the inputs it takes at a time, and into how many parts the inputs are split.

    All blocks are powers of two, 16 or greater. Parts of a split are computed side by side, then added in order.
    """

    block_t: int
    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTiles:
    """Keys that a program of attention takes at a time, and into how many splits decoding cuts a context.

    Keys are a power of two, 16 or greater. Attention of prompts splits nothing.
    """

    keys: int
    num_splits: int = 1
    num_warps: int = 4
    num_stages: int = 3


AnyTiles = Tiles | AttentionTiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The fastest of some candidates. `tiles` None: not our kernel but the vendor's library."""

    tiles: AnyTiles | None
    microseconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing to measure: `launch` runs it as a candidate says; only candidates that it can run are listed."""

    key: str
    candidates: Sequence[Any]
    launch: Callable[[Any], object]


def key_of(kernel: str, dtype: torch.dtype, num_tokens: int, *sizes: int) -> str:
    """Where the choice for a shape is stored: T rounded up to a power of two, all other sizes as they are."""
    bucket = min(max(1 << (max(num_tokens, 1) - 1).bit_length(), _LEAST_BUCKET), _GREATEST_BUCKET)
    return "/".join([kernel, str(dtype).removeprefix("torch."), f"t{bucket}", "x".join(map(str, sizes))])


def attention_key(
    kernel: str, dtype: torch.dtype, cache: torch.dtype, num_queries: int, *sizes: int, context: int = 0
) -> str:
    """Where the choice for attention is stored: rows of a decode step, or queries of a chunk, rounded up to a power of
    four; types of queries and cache; heads, KV heads and head_dim; and for decoding a context, rounded down to a power
    of two."""
    names = [str(each).removeprefix("torch.") for each in (dtype, cache)]
    bucket = 1 << ((max(num_queries, 1) - 1).bit_length() + 1) // 2 * 2
    form = f"c{1 << (context.bit_length() - 1)}/" if context else ""
    return f"{kernel}/{'/'.join(names)}/q{bucket}/{form}{'x'.join(map(str, sizes))}"


def tiles_of(device: torch.device, key: str) -> Tiles | None:
    """The tiles measured on this GPU for a product; None: nothing was, or the library won."""
    choice = stored(device).get(key)
    return choice.tiles if choice is not None and isinstance(choice.tiles, Tiles) else None


def attention_tiles_of(device: torch.device, key: str) -> AttentionTiles | None:
    """The same for attention."""
    choice = stored(device).get(key)
    return choice.tiles if choice is not None and isinstance(choice.tiles, AttentionTiles) else None


def gpu_name(device: torch.device) -> str | None:
    """None for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def file_of(gpu_name: str, folder: Path | None = None) -> Path:
    """`NVIDIA H100 80GB HBM3` → `nvidia-h100-80gb-hbm3.json`."""
    return (folder or FOLDER) / (re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-") + ".json")


def read(path: Path) -> Mapping[str, Choice]:
    """The choices of a file by key; none where there is no file. Raises ValueError if it is damaged."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    try:
        return {key: _choice(entry) for key, entry in json.loads(text)["choices"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a file of measured tiles ({error!r}); delete it or measure again") from None


def write(path: Path, gpu_name: str, choices: Mapping[str, Choice]) -> None:
    """Add `choices` to the file, in place of earlier ones of the same keys; all of it or nothing."""
    merged = {**read(path), **choices}
    content = {
        "gpu": gpu_name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "choices": {key: asdict(merged[key]) for key in sorted(merged)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    stored.cache_clear()


def split_of(num_tiles: int, num_inputs: int, block_k: int) -> int:
    """Unmeasured: into how many parts to split inputs, so that `num_tiles` of outputs make a few hundred programs.

    A part keeps at least four blocks: with fewer a program would hardly have begun to load ahead.
    """
    split_k = 1
    while split_k < 8 and num_tiles * split_k * 2 <= _ENOUGH_PROGRAMS and num_inputs >= split_k * 2 * 4 * block_k:
        split_k *= 2
    return split_k


@lru_cache
def stored(device: torch.device) -> Mapping[str, Choice]:
    """What was measured on GPUs with the name of this one; nothing for a CPU."""
    name = gpu_name(device)
    return {} if name is None else read(file_of(name))


def fastest(problem: Problem, timer: Callable[[Callable[[], object]], float]) -> Choice:
    """Time every candidate; one that does not run on the card (registers, shared memory, a compiler that fails, a
    library that refuses the shape) is passed over.

    `timer` gives the microseconds of a call. Raises ValueError when no candidate runs, RuntimeError when the card
    runs nothing any more. Of equals the first wins.
    """
    choices = []
    for tiles in problem.candidates:
        try:
            problem.launch(tiles)  # compiles
            choices.append(Choice(tiles=tiles, microseconds=timer(partial(problem.launch, tiles))))
        except (triton.TritonError, RuntimeError) as error:
            log.info("%s: %s is passed over: %s", problem.key, tiles, str(error).partition("\n")[0])
            _synchronise()
    if not choices:
        raise ValueError(f"{problem.key}: none of {len(problem.candidates)} candidates runs on this card")
    return min(choices, key=lambda choice: choice.microseconds)


def _synchronise() -> None:
    """Raises RuntimeError once the card runs nothing any more, as after an illegal address."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def tune(
    problems: Iterable[Problem],
    *,
    gpu_name: str | None = None,
    folder: Path | None = None,
    timer: Callable[[Callable[[], object]], float] | None = None,
) -> Iterator[tuple[str, Choice]]:
    """Measure on the present card and write its file after every problem: an interrupted run keeps what it has.

    Yields key and choice of each as soon as it is written.
    """
    name = torch.cuda.get_device_name() if gpu_name is None else gpu_name
    for problem in problems:
        choice = fastest(problem, microseconds if timer is None else timer)
        write(file_of(name, folder), name, {problem.key: choice})
        yield problem.key, choice


def _choice(entry: Mapping[str, Any]) -> Choice:
    tiles: AnyTiles | None = None
    if entry["tiles"] is not None:
        tiles = AttentionTiles(**entry["tiles"]) if "keys" in entry["tiles"] else Tiles(**entry["tiles"])
    return Choice(tiles=tiles, microseconds=float(entry["microseconds"]))
