"""The OpenVINO lowering: the decoder as a graph for the CPU plugin, rebuilt and compiled at every start.

Compiling takes fractions of a second for small models and shares the weights with the memory-mapped file, so nothing
compiled is stored: an engine directory holds weights, not machine code.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov  # type: ignore[import-untyped]

from pageflight.core.errors import ConfigError, ManifestMismatch
from pageflight.core.manifest import EngineManifest
from pageflight.lowering.base import CompiledModel
from pageflight.lowering.engine_dir import Verification, compare_fingerprints, open_engine
from pageflight.lowering.openvino_model import OpenVinoModel
from pageflight.lowering.openvino_ops import GraphOps
from pageflight.lowering.padded import PaddedModel
from pageflight.models.config import DecoderConfig
from pageflight.models.decoder import decoder

BLOCK_SIZE = 32  # fixed by the CPU plugin's attention kernel
_KV_PRECISION = {"fp32": "f32", "bf16": "bf16", "u8": "u8"}
_DTYPES = ("fp32", "bf16", "int8", "int4")
_MACHINES = {"AMD64": "x86_64", "arm64": "aarch64"}
_DYNAMIC_GROUPS = (256, 128, 64, 32)


class OpenVinoLowering:
    """Engines for the CPU.

    Activations are float32 for fp32 weights; for the others bf16 where the CPU has bf16 arithmetic, float32 elsewhere:
    there bf16 weights are widened inside the products, since emulated bf16 would be far slower. int8 and int4 round
    activations in groups on the way into each product (dynamic quantisation). `exact` computes in float32 without that
    rounding, to tell a kernel's error from a format's.
    """

    name = "openvino"
    block_size = BLOCK_SIZE

    def __init__(self, *, exact: bool = False) -> None:
        self._exact = exact
        self._core = ov.Core()

    def fingerprint(self, dtype: str) -> dict[str, str]:
        """Versions and CPU features an engine of `dtype` depends on. Raises ConfigError for an unknown `dtype`."""
        self._check_dtype(dtype)
        entries = {"openvino": ov.get_version(), "machine": _MACHINES.get(platform.machine(), platform.machine())}
        if dtype != "fp32":
            entries["activations"] = "bf16" if self._has_bf16() else "fp32"
        return entries

    def default_kv_dtype(self, dtype: str) -> str:
        """The fastest cache for `dtype` on this machine."""
        return "bf16" if dtype != "fp32" and self._has_bf16() else "fp32"

    def check(self, config: DecoderConfig, dtype: str, kv_dtype: str, group_size: int = 0) -> None:
        """Raises ConfigError for a precision that cannot run here; the plugin takes every shape of decoder."""
        self._check_dtype(dtype)
        _check_kv_dtype(dtype, kv_dtype, self.default_kv_dtype(dtype))

    def load(self, engine_dir: Path, *, num_threads: int) -> OpenVinoModel:
        """Compile an engine directory; `num_threads` 0 takes all cores the process may use.

        Raises ManifestMismatch naming what does not fit this machine, this version or the files as they were built.
        """
        engine = open_engine(engine_dir, self.name)
        manifest = engine.manifest
        self._check_manifest(engine_dir, manifest)
        verification = Verification(engine)
        ops = GraphOps(engine.config, engine.weights, manifest.max_model_len)
        model = ops.model(decoder(ops, engine.config))
        compiled = self._core.compile_model(model, "CPU", self._settings(manifest, engine.config, num_threads))
        verification.finish()
        loaded = OpenVinoModel(compiled, engine.config.num_layers, engine.config.vocab_size, ops.keep)
        assert loaded.block_size == BLOCK_SIZE, "the plugin of this version has blocks of another size"
        return loaded

    def deterministic(self, model: CompiledModel, *, name: str, max_num_tokens: int) -> PaddedModel:
        """Batches as ever, but for what `PaddedModel` adds to some of them."""
        return PaddedModel(model, name=name, max_num_tokens=max_num_tokens)

    def _settings(self, manifest: EngineManifest, config: DecoderConfig, num_threads: int) -> dict[str, Any]:
        narrow = self._narrow(manifest)
        rounded = manifest.dtype in ("int8", "int4") and not self._exact
        kv_dtype = "fp32" if manifest.kv_dtype == "bf16" and not narrow else manifest.kv_dtype
        return {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if narrow else "f32",
            "KV_CACHE_PRECISION": _KV_PRECISION[kv_dtype],
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": dynamic_group(config, manifest.quant_group_size) if rounded else 0,
            "INFERENCE_NUM_THREADS": num_threads,
            "ENABLE_CPU_PINNING": False,  # instances side by side would be pinned to the same cores
        }

    def _narrow(self, manifest: EngineManifest) -> bool:
        """Whether activations are bf16."""
        return not self._exact and manifest.fingerprint.get("activations") == "bf16"

    def _check_manifest(self, folder: Path, manifest: EngineManifest) -> None:
        try:
            here = self.fingerprint(manifest.dtype)
            activations = manifest.fingerprint.get("activations", "fp32")  # as built, whatever this CPU would choose
            _check_kv_dtype(manifest.dtype, manifest.kv_dtype, activations)
        except ConfigError as error:
            raise ManifestMismatch(f"{folder}: {error}") from None
        if here.get("activations") == "bf16" and manifest.fingerprint.get("activations") == "fp32":
            here["activations"] = "fp32"  # built where bf16 is missing: any CPU can run it as it was built
        compare_fingerprints(folder, manifest.fingerprint, here)
        if manifest.block_size != BLOCK_SIZE:
            raise ManifestMismatch(f"{folder}: block_size={manifest.block_size}, {self.name} has {BLOCK_SIZE}")

    def _check_dtype(self, dtype: str) -> None:
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype={dtype!r}: supported with engine {self.name} are {', '.join(_DTYPES)}")

    def _has_bf16(self) -> bool:
        return "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _check_kv_dtype(dtype: str, kv_dtype: str, activations: str) -> None:
    if kv_dtype not in (activations, "u8"):  # the attention kernel reads what it computes in, or u8
        raise ConfigError(f"kv_dtype={kv_dtype!r}: supported with dtype {dtype!r} here are {activations}, u8")


def dynamic_group(config: DecoderConfig, weight_group: int) -> int:
    """Activations per scale of dynamic quantisation, 0 for none.

    The plugin wants groups that divide every input size and the groups of the weights; larger ones are faster, beyond
    256 outliers in the activations would cost precision.
    """
    inputs = [config.hidden_size, config.q_size, config.intermediate_size]
    common = int(np.gcd.reduce([*inputs, *([weight_group] if weight_group else [])]))
    return next((size for size in _DYNAMIC_GROUPS if common % size == 0), 0)
