"""What a build is lowered to: the lowering that its options name, with what that one has to know before."""

from __future__ import annotations

from pageflight.lowering import registry
from pageflight.lowering.base import Lowering
from pageflight.lowering.tensorrt_target import TensorRtTarget, package_of
from pageflight_build.machine import cpu_flags, default_dtype
from pageflight_build.options import EngineOptions, ServingOptions


def lowering_of(options: EngineOptions, serving: ServingOptions, num_ranks: int = 1) -> Lowering:
    """The lowering of a build whose engine is cut for so many ranks. Raises ConfigError when it is not installed."""
    if options.engine != "tensorrt":
        return registry.get(options.engine)
    target = TensorRtTarget(
        flavor=options.flavor,
        compute_capabilities=options.compute_capability,
        weights=options.weights,
        max_num_seqs=serving.max_num_seqs,
        max_num_tokens=serving.max_num_tokens,
        tensor_parallel=num_ranks,
        collectives=options.collectives,
    )
    return registry.get(options.engine, target=target)


def ranks_cut_for(options: EngineOptions, num_ranks: int) -> int:
    """For how many ranks an engine is made: others than TensorRT's are the same for any."""
    return num_ranks if options.engine == "tensorrt" else 1


def limits_of_steps(options: EngineOptions, serving: ServingOptions) -> tuple[int, ...]:
    """What an engine has to know of the steps it will run: engines that take any are built once for all."""
    return (serving.max_num_seqs, serving.max_num_tokens) if options.engine == "tensorrt" else ()


def package_name(options: EngineOptions) -> str:
    """The package that lowers."""
    return package_of(options.flavor) if options.engine == "tensorrt" else options.engine


def chosen_dtype(options: EngineOptions) -> str:
    """The dtype asked for, else the one that suits the target: bf16 for GPUs, and for CPUs that have it."""
    return options.dtype or ("bf16" if options.engine == "tensorrt" else default_dtype(cpu_flags()))
