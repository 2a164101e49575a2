"""The engine's weights on disk: one safetensors file under the names that `models` uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pageflight.core.errors import CheckpointError, ManifestMismatch
from pageflight.models.config import DecoderConfig
from pageflight.models.safetensors_file import SafetensorsFile
from pageflight.models.weights import EMBED, HEAD, expected_shapes
from pageflight.quant.forms import QUANTISED_FORMS, WeightForm, input_scale_name, scale_name
from pageflight.quant.weight import Weight

WEIGHTS_NAME = "model.safetensors"
_FORMS = {"F32": "F32", "F16": "F16", "BF16": "BF16", "I8": "I8", "F8_E4M3": "F8_E4M3", "U8": "I4"}


class Weights(Protocol):
    """Weights by name: all of an engine's, or one rank's parts of them."""

    def __getitem__(self, name: str) -> Weight: ...

    def stored_name(self, name: str) -> str:
        """Under which name it is stored: a tied head is the embedding."""


class WeightStore:
    """Weights of an engine by name, as views of the memory-mapped file: keep the store while they are in use.

    `forms` has every stored weight's form; `stored_name` says under which name one is stored.
    """

    def __init__(self, path: Path, config: DecoderConfig) -> None:
        """Open `path`. Raises ManifestMismatch when it is damaged or does not hold the weights of `config`."""
        try:
            self.file = SafetensorsFile(path)
        except CheckpointError as error:
            raise ManifestMismatch(f"{error}") from None
        self._aliases = {}
        expected = expected_shapes(config)
        if config.tied_head and HEAD not in self.file.records:
            self._aliases[HEAD] = EMBED
        elif config.tied_head:
            expected[HEAD] = expected[EMBED]
        self.forms = {name: self._form(name, shape) for name, shape in expected.items()}
        known = {tensor for name, form in self.forms.items() for tensor in form.tensors(name)}
        unknown = sorted(set(self.file.records) - known)
        if unknown:
            raise ManifestMismatch(f"{path}: unknown weights {unknown[:3]}; built by another version, build again")

    def __getitem__(self, name: str) -> Weight:
        """The weight as stored. A tied head is the embedding under its own name."""
        stored = self.stored_name(name)
        form = self.forms[stored]
        scales = None if form.scales is None else self.file.array(scale_name(stored))
        input_scale = float(self.file.array(input_scale_name(stored))[0]) if form.input_scale else None
        return Weight(stored, form.dtype, self.file.array(stored), scales, input_scale)

    def tensor(self, name: str) -> NDArray[Any]:
        """A stored tensor as it is: a weight's values, its scales, its input scale."""
        return self.file.array(self.stored_name(name))

    def stored_name(self, name: str) -> str:
        return self._aliases.get(name, name)

    @property
    def num_bytes(self) -> int:
        return sum(record.end - record.begin for record in self.file.records.values())

    def _form(self, name: str, shape: tuple[int, ...]) -> WeightForm:
        """The form of `name`, whose [N, K] or [N] is `shape`. Raises ManifestMismatch when it is not here in one."""
        path, records = self.file.path, self.file.records
        record = records.get(name)
        dtype = _FORMS.get(record.dtype) if record else None
        scales = records.get(scale_name(name)) if dtype in QUANTISED_FORMS else None
        input_scale = records.get(input_scale_name(name)) if dtype in QUANTISED_FORMS else None
        form = WeightForm(
            dtype or "F32",
            shape,
            None if scales is None or len(scales.shape) != 2 else (scales.shape[0], scales.shape[1]),
            input_scale is not None,
        )
        stored, stored_shape = form.tensors(name)[name] if dtype != "I4" or len(shape) == 2 else ("", ())
        if record is None or (record.dtype, record.shape) != (stored, stored_shape):
            found = f"{record.dtype} {list(record.shape)}" if record else "nothing"
            raise ManifestMismatch(f"{path}: {name} should have shape {list(shape)}, found {found}; build again")
        if dtype in QUANTISED_FORMS:
            self._check_scales(form, name)
        return form

    def _check_scales(self, form: WeightForm, name: str) -> None:
        path = self.file.path
        record = self.file.records.get(scale_name(name))
        if record is None or record.dtype != "F32" or form.scales is None:
            raise ManifestMismatch(f"{path}: {name} is quantised without float32 scales; build again")
        groups = form.scales[1]
        fits = form.scales[0] == form.shape[0] or (form.dtype == "F8_E4M3" and form.scales == (1, 1))
        if not fits or groups < 1 or form.shape[1] % groups or (form.dtype == "F8_E4M3" and groups != 1):
            raise ManifestMismatch(f"{path}: scales of {name} have shape {list(record.shape)}; build again")
        inputs = self.file.records.get(input_scale_name(name))
        if inputs is None:
            return
        scale = self.file.array(inputs.name)
        if inputs.dtype != "F32" or inputs.shape != (1,) or not np.isfinite(scale[0]) or scale[0] <= 0:
            raise ManifestMismatch(f"{path}: {inputs.name} must be one positive float32; build again")
