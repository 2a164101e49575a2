"""An engine directory as a lowering opens it: manifest, configuration and weights, each checked against the others."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from pathlib import Path

from pageflight.core.errors import ManifestMismatch
from pageflight.core.manifest import EngineManifest
from pageflight.models.config import DecoderConfig
from pageflight.models.sharding import Shard, Split
from pageflight.models.stages import Stage, check_stages, cut_stages
from pageflight.models.weights import EMBED, FINAL_NORM, HEAD, expected_shapes, layer_of
from pageflight.quant.sharding import input_unit
from pageflight.quant.store import WEIGHTS_NAME, WeightStore

_READ_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class EngineDir:
    """A folder that `pageflight build` made, opened."""

    folder: Path
    manifest: EngineManifest
    config: DecoderConfig
    weights: WeightStore

    def split(self, shard: Shard) -> Split:
        """Its model cut for one of several ranks. Raises ConfigError, naming the sizes that work."""
        unit = input_unit(self.manifest.dtype, self.manifest.quant_group_size)
        return Split(config=self.config, shard=shard, input_unit=unit)

    def stages(self, num_stages: int) -> tuple[Stage, ...]:
        """Its layers cut into stages whose weights are as even as can be. Raises ConfigError for more than layers."""
        check_stages(self.config, num_stages)
        ends = [self.weights[name].num_bytes for name in (EMBED, FINAL_NORM, HEAD)]
        layers = [0] * self.config.num_layers
        for name in expected_shapes(self.config):
            layer = layer_of(name)
            if layer is not None:
                layers[layer] += self.weights[name].num_bytes
        return cut_stages(layers, first_bytes=ends[0], last_bytes=ends[1] + ends[2], num_stages=num_stages)


def open_engine(folder: Path, lowering: str, tensor_parallel: int = 1) -> EngineDir:
    """Open an engine built for `lowering`, and for so many ranks where it differs by their number. Raises
    ManifestMismatch naming what does not fit."""
    manifest = EngineManifest.read(folder)
    if manifest.lowering != lowering:
        raise ManifestMismatch(f"{folder}: lowering={manifest.lowering!r}, asked to load it with {lowering!r}")
    if (manifest.tensor_parallel, manifest.pipeline_parallel) != (tensor_parallel, 1):
        raise ManifestMismatch(
            f"{folder} was built for tensor_parallel={manifest.tensor_parallel},"
            f" pipeline_parallel={manifest.pipeline_parallel}, and is to run with {tensor_parallel} and 1; build the"
            " engine again"
        )
    config = DecoderConfig.from_json(manifest.model)
    if manifest.vocab_size != config.vocab_size:
        raise ManifestMismatch(f"{folder}: vocab_size={manifest.vocab_size}, its model has {config.vocab_size}")
    for record in manifest.files:
        path = folder / record.path
        if not path.is_file():
            raise ManifestMismatch(f"{path} is missing; build the engine again")
        if path.stat().st_size != record.num_bytes:
            raise ManifestMismatch(
                f"{path} has {path.stat().st_size} bytes, the manifest says {record.num_bytes}; build the engine again"
            )
    return EngineDir(folder, manifest, config, WeightStore(folder / WEIGHTS_NAME, config))


class Verification:
    """Hashes the engine's files beside the compilation, whose reading of them it warms up."""

    def __init__(self, engine: EngineDir) -> None:
        self._engine = engine
        self._problem: ManifestMismatch | None = None
        self._thread = threading.Thread(target=self._run, name="pageflight-verify", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for record in self._engine.manifest.files:
            path = self._engine.folder / record.path
            digest = hashlib.sha256()
            try:
                with path.open("rb") as file:
                    while piece := file.read(_READ_BYTES):
                        digest.update(piece)
            except OSError as error:
                self._problem = ManifestMismatch(f"{path} cannot be read: {error.strerror}")
                return
            if digest.hexdigest() != record.sha256:
                self._problem = ManifestMismatch(
                    f"{path} was changed after the build (sha256 differs); build the engine again"
                )
                return

    def finish(self) -> None:
        """Wait for the hashes. Raises ManifestMismatch when a file is not the one that was built."""
        self._thread.join()
        if self._problem is not None:
            raise self._problem


def compare_fingerprints(folder: Path, built: dict[str, str], here: dict[str, str]) -> None:
    """Raises ManifestMismatch listing every entry of `built` that this machine answers differently."""
    differing = [
        f"{key} {built.get(key, 'absent')!r}, here {here.get(key, 'absent')!r}"
        for key in sorted({*built, *here})
        if built.get(key) != here.get(key)
    ]
    if differing:
        reasons = "; ".join(differing)
        raise ManifestMismatch(f"{folder} was built for another machine: {reasons}; build the engine again")
