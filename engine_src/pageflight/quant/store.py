"""The engine's weights on disk: one safetensors file under the names that `models` uses."""

from __future__ import annotations

from pathlib import Path

from pageflight.core.errors import CheckpointError, ManifestMismatch
from pageflight.models.config import DecoderConfig
from pageflight.models.safetensors_file import SafetensorsFile
from pageflight.models.weights import EMBED, HEAD, expected_shapes
from pageflight.quant.weight import Weight

WEIGHTS_NAME = "model.safetensors"
_STORED = ("F32", "BF16", "I8")


def scale_name(weight: str) -> str:
    return weight + ".scale"


class WeightStore:
    """Weights of an engine by name, as views of the memory-mapped file: keep the store while they are in use."""

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
        for name, shape in expected.items():
            record = self.file.records.get(name)
            if record is None or record.shape != shape or record.dtype not in _STORED:
                found = f"{record.dtype} {list(record.shape)}" if record else "nothing"
                raise ManifestMismatch(f"{path}: {name} should have shape {list(shape)}, found {found}; build again")
            if record.dtype == "I8":
                self._check_scales(path, name, shape)
        known = {*expected, *(scale_name(name) for name in expected)}
        unknown = sorted(set(self.file.records) - known)
        if unknown:
            raise ManifestMismatch(f"{path}: unknown weights {unknown[:3]}; built by another version, build again")

    def _check_scales(self, path: Path, name: str, shape: tuple[int, ...]) -> None:
        record = self.file.records.get(scale_name(name))
        if record is None or record.dtype != "F32" or len(record.shape) != 2:
            raise ManifestMismatch(f"{path}: {name} is int8 without float32 scales; build again")
        rows, groups = record.shape
        if rows != shape[0] or groups < 1 or shape[1] % groups:
            raise ManifestMismatch(f"{path}: scales of {name} have shape {list(record.shape)}; build again")

    def __getitem__(self, name: str) -> Weight:
        """The weight as stored. A tied head is the embedding under its own name."""
        stored = self._aliases.get(name, name)
        record = self.file.records[stored]
        scales = self.file.array(scale_name(stored)) if record.dtype == "I8" else None
        return Weight(stored, record.dtype, self.file.array(stored), scales)

    @property
    def num_bytes(self) -> int:
        return sum(record.end - record.begin for record in self.file.records.values())
