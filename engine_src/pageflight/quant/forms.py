"""Which form every weight of a build takes, and the tensors that a file holds for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pageflight.core.errors import ConfigError
from pageflight.models.config import DecoderConfig
from pageflight.models.families import family_of
from pageflight.models.weights import EMBED, HEAD, Role, WeightSpec
from pageflight.quant.int4 import GROUP_SIZES, check_int4_groups
from pageflight.quant.weight import num_groups

DTYPES = ("fp32", "fp16", "bf16", "fp8", "int8", "int4")
GROUPED_DTYPES = ("int8", "int4")
QUANTISED_FORMS = ("I8", "I4", "F8_E4M3")

_MATRIX = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "fp8": "F8_E4M3", "int8": "I8", "int4": "I4"}
_TABLE = {"fp32": "F32", "fp16": "F16"}
_HEAD = {**_TABLE, "int8": "I8"}
"""Few methods touch the head: its error goes straight into the logits. int8 is fine enough for it."""


def scale_name(weight: str) -> str:
    return weight + ".scale"


def input_scale_name(weight: str) -> str:
    return weight + ".input_scale"


@dataclass(frozen=True, slots=True)
class WeightForm:
    """All of a `Weight` but its numbers. `shape` is [N, K] of a matrix, packed or not; `scales` the scales' shape."""

    dtype: str
    shape: tuple[int, ...]
    scales: tuple[int, int] | None = None
    input_scale: bool = False

    def tensors(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors that hold it under `name`: dtype of safetensors and shape."""
        found = {name: (self.dtype, self.shape)}
        if self.dtype == "I4":
            rows, columns = self.shape
            found = {name: ("U8", (rows, columns // 2))}
        if self.scales is not None:
            found[scale_name(name)] = ("F32", self.scales)
        if self.input_scale:
            found[input_scale_name(name)] = ("F32", (1,))
        return found


def weight_specs(config: DecoderConfig, dtype: str) -> tuple[WeightSpec, ...]:
    """The weights that a build of `dtype` stores, each with its sources in a checkpoint of the family."""
    specs = family_of(config).weights(config)
    if config.tied_head and _HEAD.get(dtype, "BF16") != _TABLE.get(dtype, "BF16"):
        # the table keeps bf16 for lookups, the head is read whole every step
        specs = (*specs, WeightSpec(HEAD, Role.LINEAR, next(spec.sources for spec in specs if spec.name == EMBED)))
    return specs


def weight_forms(
    config: DecoderConfig, dtype: str, group_size: int = 0, input_scales: Iterable[str] = ()
) -> dict[str, WeightForm]:
    """The form of every stored weight; `input_scales` names those whose activations have a calibrated scale.

    Raises ConfigError for an unknown dtype and for groups that do not fit.
    """
    check_group_size(dtype, group_size)
    calibrated = frozenset(input_scales)
    return {spec.name: _form(spec, dtype, group_size, spec.name in calibrated) for spec in weight_specs(config, dtype)}


def check_group_size(dtype: str, group_size: int) -> None:
    """Raises ConfigError for an unknown dtype, and for a group size beside one without groups."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: supported are {', '.join(DTYPES)}")
    if group_size and dtype not in GROUPED_DTYPES:
        raise ConfigError(f"group_size={group_size}: only dtypes int8 and int4 have groups, dtype is {dtype}")


def default_group_size(config: DecoderConfig, dtype: str) -> int:
    """Inputs per scale unless told otherwise: the largest usual group that fits for int4, 0 (per output) for others."""
    inputs = (config.hidden_size, config.q_size, config.intermediate_size)
    if dtype != "int4":
        return 0
    return next((size for size in GROUP_SIZES if all(count % size == 0 for count in inputs)), 0)


def _form(spec: WeightSpec, dtype: str, group_size: int, calibrated: bool) -> WeightForm:
    if spec.role is Role.VECTOR:
        return WeightForm("F32", spec.shape)
    if spec.role is Role.TABLE:
        return WeightForm(_TABLE.get(dtype, "BF16"), spec.shape)
    stored = _HEAD.get(dtype, "BF16") if spec.name == HEAD else _MATRIX[dtype]
    if stored not in QUANTISED_FORMS:
        return WeightForm(stored, spec.shape)
    rows, columns = spec.shape
    if stored == "I4":
        check_int4_groups(columns, group_size)
    return WeightForm(stored, spec.shape, (rows, num_groups(columns, group_size)), calibrated)
