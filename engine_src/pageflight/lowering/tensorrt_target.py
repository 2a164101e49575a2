"""What TensorRT engines are built for, and which package builds them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from pageflight.core.errors import ConfigError

FLAVORS = ("rtx", "full")
WEIGHTS = ("input", "constant")
COLLECTIVES = ("between", "inside")
_PACKAGES = {"rtx": "tensorrt_rtx", "full": "tensorrt"}
_SOURCES = {
    "rtx": "install pageflight[tensorrt]",
    "full": "it comes from NVIDIA's package index (pip install tensorrt) and in its container nvcr.io/nvidia/tensorrt,"
    " and needs the GPU that it builds for; --flavor rtx builds without one",
}
_LEAST_CAPABILITY = {"fp16": 75, "fp32": 80, "bf16": 80, "int8": 80, "int4": 80, "fp8": 89}
"""By dtype of the weights, with the activations it has: the RTX builder refuses older GPUs."""
FP8_CAPABILITY = 89
COLLECTIVE_CAPABILITY = 80
"""Layers that sum over ranks: NVIDIA's documentation says so; RTX builds them for 7.5 too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRtTarget:
    """A flavor of TensorRT, the GPUs to build for (89 is compute capability 8.9; none: all that it can), and whether
    weights are inputs of the engines or constants in them. Steps have up to `max_num_seqs` rows that sample and
    `max_num_tokens` tokens. Engines are those of `tensor_parallel` ranks, whose sums (`collectives`) are `between`
    engines, or layers `inside` them.
    """

    flavor: str = "rtx"
    compute_capabilities: tuple[int, ...] = ()
    weights: str = "input"
    max_num_seqs: int = 256
    max_num_tokens: int = 256
    tensor_parallel: int = 1
    collectives: str = "between"


def package_of(flavor: str) -> str:
    """The name of the module that builds `flavor`."""
    return _PACKAGES[flavor]


def import_flavor(flavor: str) -> Any:
    """The module that builds `flavor`. Raises ConfigError saying where to get it when it is not here."""
    try:
        return importlib.import_module(_PACKAGES[flavor])
    except ImportError as error:
        reason = f"flavor={flavor!r} needs the package {_PACKAGES[flavor]}, which cannot be imported ({error})"
        raise ConfigError(f"{reason}; {_SOURCES[flavor]}") from None


def check_capabilities(trt: Any, target: TensorRtTarget, dtype: str) -> None:
    """Raises ConfigError for compute capabilities that the package does not know, or that lack `dtype`."""
    chosen = target.compute_capabilities
    if target.flavor == "full":
        if chosen:
            raise ConfigError(
                f"compute_capability={_listed(chosen)}: flavor 'full' builds for the GPU of this machine only;"
                " leave it out, or use flavor 'rtx'"
            )
        return
    known = known_capabilities(trt)
    unknown = [capability for capability in chosen if capability not in known]
    if unknown:
        raise ConfigError(
            f"compute_capability={_listed(unknown)}: {package_of(target.flavor)} {trt.__version__} builds for"
            f" {_listed(known)}; flavor 'full' has the others"
        )
    least = _LEAST_CAPABILITY[dtype]
    older = [capability for capability in chosen if capability < least]
    if older:
        raise ConfigError(f"compute_capability={_listed(older)}: dtype {dtype} needs {least} or later")


def check_collectives(trt: Any, target: TensorRtTarget) -> None:
    """Raises ConfigError where sums over ranks cannot be layers."""
    if target.collectives != "inside":
        return
    if target.tensor_parallel == 1:
        raise ConfigError("collectives='inside': there is nothing to sum with tensor_parallel=1")
    if not hasattr(trt.INetworkDefinition, "add_dist_collective"):
        raise ConfigError(
            f"collectives='inside': {package_of(target.flavor)} {trt.__version__} has no add_dist_collective;"
            " sums can be between its engines: --collectives between"
        )
    older = [capability for capability in target.compute_capabilities if capability < COLLECTIVE_CAPABILITY]
    if older:
        raise ConfigError(
            f"compute_capability={_listed(older)}: collectives inside engines need {COLLECTIVE_CAPABILITY} or later"
        )


def known_capabilities(trt: Any) -> tuple[int, ...]:
    """The compute capabilities that an RTX builder can be told to build for."""
    names = [name for name in dir(trt.ComputeCapability) if name.startswith("SM")]
    return tuple(sorted(int(name.removeprefix("SM")) for name in names))


def collecting_log(trt: Any) -> Any:
    """A logger for TensorRT that keeps `errors` for the exception that follows them, and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()


def _listed(capabilities: tuple[int, ...] | list[int]) -> str:
    return ",".join(map(str, capabilities))
