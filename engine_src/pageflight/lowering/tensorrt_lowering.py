"""The TensorRT lowering: the parts of a decoder between attentions as engines, built ahead of time.

The RTX flavor builds them without a GPU; running them takes one.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

from pageflight.core.errors import ConfigError, ManifestMismatch
from pageflight.core.manifest import EngineManifest
from pageflight.lowering.base import CompiledModel
from pageflight.lowering.engine_dir import open_engine
from pageflight.lowering.tensorrt_build import build_engines
from pageflight.lowering.tensorrt_gpu import find_gpu
from pageflight.lowering.tensorrt_plan import EnginePlan
from pageflight.lowering.tensorrt_target import (
    FP8_CAPABILITY,
    TensorRtTarget,
    check_capabilities,
    check_collectives,
    import_flavor,
    package_of,
)
from pageflight.models.config import DecoderConfig
from pageflight.quant.sharding import input_unit
from pageflight.quant.store import WEIGHTS_NAME, WeightStore

_DTYPES = ("fp32", "fp16", "bf16", "fp8", "int8", "int4")
_QUANTISED_ACTIVATIONS = "bf16"


class TensorRtLowering:
    """Engines for NVIDIA GPUs, as `target` says.

    Activations are as wide as the weights, bf16 between quantised ones; so is the K/V cache.
    """

    name = "tensorrt"
    block_size = 32

    def __init__(self, target: TensorRtTarget | None = None) -> None:
        self._target = target or TensorRtTarget()

    def fingerprint(self, dtype: str) -> dict[str, str]:
        """The package and GPUs that engines of `dtype` are built with and for.

        Raises ConfigError for an unknown `dtype`, when the package is not here, and for flavor `full` without a GPU.
        """
        self._check_dtype(dtype)
        target = self._target
        trt = import_flavor(target.flavor)
        capabilities = ",".join(map(str, target.compute_capabilities)) or "any"
        if target.flavor == "full":
            gpu = find_gpu()
            if gpu is None:
                raise ConfigError(
                    "flavor='full' builds for the GPU of this machine, and there is none; flavor 'rtx' needs none"
                )
            capabilities = f"{gpu.capability} of {gpu.name}"
        return {
            package_of(target.flavor): trt.__version__,
            "compute_capabilities": capabilities,
            "activations": self.activations(dtype),
            "machine": platform.machine(),
            **({"collectives": target.collectives} if target.tensor_parallel > 1 else {}),
        }

    def activations(self, dtype: str) -> str:
        """The precision of what passes between products."""
        return dtype if dtype in ("fp32", "fp16", "bf16") else _QUANTISED_ACTIVATIONS

    def default_kv_dtype(self, dtype: str) -> str:
        """The cache holds K and V as the engines hand them over, unless it is to round them."""
        return self.activations(dtype)

    def check(self, config: DecoderConfig, dtype: str, kv_dtype: str, group_size: int = 0) -> None:
        """Raises ConfigError for a precision, or a GPU, that engines cannot be built for."""
        self._check_dtype(dtype)
        wanted = self.activations(dtype)
        if kv_dtype not in (wanted, "fp8"):
            raise ConfigError(
                f"kv_dtype={kv_dtype!r}: supported with engine tensorrt and dtype {dtype!r} are {wanted}, fp8"
            )
        trt = import_flavor(self._target.flavor)
        check_capabilities(trt, self._target, dtype)
        check_collectives(trt, self._target)
        older = [each for each in self._target.compute_capabilities if each < FP8_CAPABILITY]
        if kv_dtype == "fp8" and older:
            raise ConfigError(
                f"compute_capability={','.join(map(str, older))}: kv_dtype fp8 needs {FP8_CAPABILITY} or later"
            )

    def compile(
        self,
        engine_dir: Path,
        config: DecoderConfig,
        *,
        dtype: str,
        group_size: int,
        max_model_len: int,
        advance: Callable[[int, int], None],
    ) -> str:
        """Build the engines of the weights in `engine_dir`. Raises ConfigError when one cannot be built."""
        plan = build_engines(
            engine_dir,
            config,
            WeightStore(engine_dir / WEIGHTS_NAME, config),
            self._target,
            activations=self.activations(dtype),
            num_positions=max_model_len,
            input_unit=input_unit(dtype, group_size),
            advance=advance,
        )
        size = sum(segment.num_bytes for segment in plan.segments)
        where = "outside" if plan.weights == "input" else "inside"
        ranks = f", {plan.tensor_parallel} ranks with sums {plan.collectives}" if plan.tensor_parallel > 1 else ""
        return (
            f"{len(plan.segments)} engines, {size / 1e6:,.1f} MB, weights {where}, {len(plan.profiles)} profiles{ranks}"
        )

    def missing_device(self) -> str:
        """Why engines cannot run here."""
        if find_gpu() is None:
            return "engine tensorrt needs an NVIDIA GPU and its driver, and there is none here"
        return "engine tensorrt runs beside torch and triton, and here is no torch with CUDA; install pageflight[gpu]"

    def load(self, engine_dir: Path, *, num_threads: int) -> CompiledModel:
        """Raises ManifestMismatch for a directory that does not fit, ConfigError where its engines cannot run."""
        engine = open_engine(engine_dir, self.name, EngineManifest.read(engine_dir).tensor_parallel)
        plan = EnginePlan.read(engine_dir)
        if engine.manifest.block_size != self.block_size:
            raise ManifestMismatch(
                f"{engine_dir}: block_size={engine.manifest.block_size}, {self.name} has {self.block_size}"
            )
        for segment in plan.segments:
            if not (engine_dir / segment.file).is_file():
                raise ManifestMismatch(f"{engine_dir / segment.file} is missing; build the engine again")
        raise ConfigError(f"{engine_dir}: {self.missing_device()}")

    def deterministic(self, model: CompiledModel, *, name: str, max_num_tokens: int) -> CompiledModel:
        """Raises ConfigError: nothing here can be tried."""
        raise ConfigError(f"deterministic=True: {self.missing_device()}, so that nobody can say whether {name} is")

    def _check_dtype(self, dtype: str) -> None:
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype={dtype!r}: supported with engine {self.name} are {', '.join(_DTYPES)}")
