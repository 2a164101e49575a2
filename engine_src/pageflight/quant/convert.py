"""From a checkpoint to the engine's weights: fuse, check, round, write; one pass, never a whole model in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pageflight.core.errors import CheckpointError, ConfigError
from pageflight.models.bits import bf16_bits, to_float32
from pageflight.models.checkpoint import Checkpoint
from pageflight.models.config import DecoderConfig
from pageflight.models.safetensors_file import SafetensorsWriter
from pageflight.models.weights import EMBED, HEAD, Role, WeightSpec
from pageflight.quant.store import scale_name
from pageflight.quant.weight import num_groups, quantise

DTYPES = ("fp32", "bf16", "int8")
_PIECE_ELEMENTS = 1 << 22
_LARGEST_BF16 = 3.3895e38

Progress = Callable[[int, int], None]
"""Called with (elements done, elements in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What `convert` wrote. `max_error` is the largest |stored - original| ÷ largest |original| of any weight."""

    path: Path
    num_bytes: int
    num_parameters: int
    max_error: float


def convert(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    target: Path,
    *,
    dtype: str,
    group_size: int = 0,
    progress: Progress | None = None,
) -> Converted:
    """Write the weights of `config` as the safetensors file `target`, fused and in `dtype`.

    fp32 keeps every value; bf16 rounds matrices to bf16; int8 stores linear weights as symmetric int8 with one float32
    scale per output channel (`group_size` 0) or per `group_size` inputs of it, and the embedding in bf16. Norms and
    biases stay float32. Raises CheckpointError for NaN or infinite weights, ConfigError for an unknown dtype or a group
    size that does not fit; nothing is left at `target` then.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: supported are {', '.join(DTYPES)}")
    if group_size and dtype != "int8":
        raise ConfigError(f"group_size={group_size}: only dtype int8 has groups")
    specs = list(checkpoint.specs(config))
    if config.tied_head and dtype == "int8":  # the table keeps bf16 for lookups, the head is read whole every step
        specs.append(WeightSpec(HEAD, Role.LINEAR, next(spec.sources for spec in specs if spec.name == EMBED)))
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    for spec in specs:
        layout[spec.name] = (_stored_dtype(spec, dtype), spec.shape)
        if layout[spec.name][0] == "I8":
            layout[scale_name(spec.name)] = ("F32", (spec.shape[0], num_groups(spec.shape[1], group_size)))
    total = sum(int(np.prod(spec.shape)) for spec in specs)
    writer = SafetensorsWriter(target, layout, {"format": "pageflight", "dtype": dtype, "group_size": str(group_size)})
    done, max_error = 0, 0.0
    try:
        for spec in specs:
            for elements, error in _pieces(checkpoint, spec, writer, layout[spec.name][0], group_size):
                done, max_error = done + elements, max(max_error, error)
                if progress is not None:
                    progress(done, total)
        writer.close()
    except BaseException:
        writer.abandon()
        raise
    return Converted(path=target, num_bytes=target.stat().st_size, num_parameters=total, max_error=max_error)


def _stored_dtype(spec: WeightSpec, dtype: str) -> str:
    if spec.role is Role.VECTOR or dtype == "fp32":
        return "F32"
    return "I8" if dtype == "int8" and spec.role is Role.LINEAR else "BF16"


def _pieces(
    checkpoint: Checkpoint, spec: WeightSpec, writer: SafetensorsWriter, stored: str, group_size: int
) -> Iterator[tuple[int, float]]:
    """Fill one weight, a few rows at a time; yields (elements, relative error) of every piece."""
    out = writer.array(spec.name)
    rows_at_once = max(1, _PIECE_ELEMENTS // max(1, int(np.prod(spec.shape[1:]))))
    row = 0
    for source in spec.sources:
        array, source_dtype = checkpoint.array(source.name), checkpoint.record(source.name).dtype
        for begin in range(0, len(array), rows_at_once):
            values = to_float32(array[begin : begin + rows_at_once], source_dtype)
            here = slice(row, row + len(values))
            row += len(values)
            largest = float(np.abs(values).max(initial=0.0))
            if not np.isfinite(largest):
                count = int(np.count_nonzero(~np.isfinite(values)))
                raise CheckpointError(f"{checkpoint.folder}: {source.name} holds {count} NaN or infinite values")
            error = 0.0
            if stored == "I8":
                out[here], scales = quantise(values, group_size)
                writer.array(scale_name(spec.name))[here] = scales
                error = float(scales.max()) / 2
            elif stored == "BF16" and source_dtype == "BF16":
                out[here] = array[begin : begin + rows_at_once]
            elif stored == "BF16":
                if largest > _LARGEST_BF16:
                    raise CheckpointError(
                        f"{checkpoint.folder}: {source.name} holds {largest:.4g}, beyond bf16; build with dtype fp32"
                    )
                out[here] = bf16_bits(values)
                error = largest / 256
            else:
                out[here] = values
            yield values.size, error / largest if largest else 0.0
    assert row == spec.shape[0], spec.name
