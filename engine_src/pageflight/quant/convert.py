"""From a checkpoint to the engine's weights: fuse, check, round, write; one pass, never a whole model in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pageflight.core.errors import CheckpointError, ConfigError
from pageflight.models.bits import bf16_bits, to_float32
from pageflight.models.checkpoint import Checkpoint
from pageflight.models.config import DecoderConfig
from pageflight.models.safetensors_file import SafetensorsWriter
from pageflight.models.weights import WeightSpec
from pageflight.quant.float8 import quantise_fp8
from pageflight.quant.forms import QUANTISED_FORMS, WeightForm, input_scale_name, scale_name, weight_forms, weight_specs
from pageflight.quant.int4 import quantise_int4
from pageflight.quant.weight import quantise

_PIECE_ELEMENTS = 1 << 22
_LARGEST = {"BF16": ("bf16", 3.3895e38, 256), "F16": ("fp16", 65504.0, 2048)}
"""Name, largest value and steps per power of two of the narrow floats."""
_E4M3_WIDEST_STEP = 32.0  # from 256 to 448

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
    input_scales: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Write the weights of `config` as the safetensors file `target`, fused and in `dtype`.

    fp32 keeps every value; fp16 and bf16 round matrices. int8 and int4 store linear weights as symmetric integers with
    one float32 scale per output channel (`group_size` 0) or per `group_size` inputs of it, fp8 as e4m3 with one per
    output channel; the embedding is bf16 then, and so is the head but for int8. Norms and biases stay float32.
    `input_scales` are scales of activations by weight, see `Weight`. Raises CheckpointError for NaN or infinite
    weights, ConfigError for an unknown dtype, a group size that does not fit or input scales of weights that have none;
    nothing is left at `target` then.
    """
    calibrated = dict(input_scales or {})
    forms = weight_forms(config, dtype, group_size, calibrated)
    useless = sorted(name for name in calibrated if name not in forms or not forms[name].input_scale)
    if useless:
        raise ConfigError(f"input_scales={useless[:3]}: no quantised weights of dtype {dtype}")
    checkpoint.specs(config)
    specs = weight_specs(config, dtype)
    layout = {tensor: entry for name, form in forms.items() for tensor, entry in form.tensors(name).items()}
    total = sum(int(np.prod(spec.shape)) for spec in specs)
    writer = SafetensorsWriter(target, layout, {"format": "pageflight", "dtype": dtype, "group_size": str(group_size)})
    for name, scale in calibrated.items():
        writer.array(input_scale_name(name))[0] = scale
    done, max_error = 0, 0.0
    try:
        for spec in specs:
            for elements, error in _pieces(checkpoint, spec, writer, forms[spec.name], group_size):
                done, max_error = done + elements, max(max_error, error)
                if progress is not None:
                    progress(done, total)
        writer.close()
    except BaseException:
        writer.abandon()
        raise
    return Converted(path=target, num_bytes=target.stat().st_size, num_parameters=total, max_error=max_error)


def _pieces(
    checkpoint: Checkpoint, spec: WeightSpec, writer: SafetensorsWriter, form: WeightForm, group_size: int
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
            if form.dtype in QUANTISED_FORMS:
                out[here], scales, step = _quantise(values, form.dtype, group_size)
                writer.array(scale_name(spec.name))[here] = scales
                error = float(scales.max()) * step / 2
            elif form.dtype == source_dtype:
                out[here] = array[begin : begin + rows_at_once]
            elif form.dtype in _LARGEST:
                name, limit, steps = _LARGEST[form.dtype]
                if largest > limit:
                    raise CheckpointError(
                        f"{checkpoint.folder}: {source.name} holds {largest:.4g}, beyond {name}; build with dtype fp32"
                    )
                out[here] = bf16_bits(values) if form.dtype == "BF16" else values
                error = largest / steps
            else:
                out[here] = values
            yield values.size, error / largest if largest else 0.0
    assert row == spec.shape[0], spec.name


def _quantise(
    values: NDArray[np.float32], form: str, group_size: int
) -> tuple[NDArray[np.generic], NDArray[np.float32], float]:
    """Codes, scales and the greatest distance between neighbouring codes."""
    if form == "F8_E4M3":
        return *quantise_fp8(values), _E4M3_WIDEST_STEP
    return *(quantise_int4 if form == "I4" else quantise)(values, group_size), 1.0
