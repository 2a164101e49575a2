"""Engines of TensorRT in a process: deserialised, with contexts that share one piece of memory and their kernels."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pageflight.core.errors import ConfigError
from pageflight.lowering.tensorrt_caches import RuntimeCache
from pageflight.lowering.tensorrt_plan import EnginePlan
from pageflight.lowering.tensorrt_target import collecting_log

log = logging.getLogger(__name__)

Strategies = Mapping[str, str]
Shapes = tuple[tuple[int, ...], ...]
STRATEGIES: Strategies = {"decode": "EAGER", "prefill": "NONE"}
"""When the RTX flavor compiles kernels for one exact size. Decode steps have few sizes, each captured after it has run
twice: its own kernels must be there by then, and nothing may be compiled in the background of a capture. Steps with
chunks have any size up to the largest: compiling for each would stop the stream again and again."""
_ALIGNMENT = 256  # of addresses, in bytes
_SHOWN_ERRORS = 3


class TensorRtSegments:
    """Deserialised engines with their execution contexts, made when first wanted.

    Steps with chunks share one context for each engine. Decode steps are captured: for each number of rows they have
    contexts of their own, whose shapes never change, since a graph may not run after that of its context has. Contexts
    never run at the same time: what they need for themselves is one buffer, as large as the largest wants it.
    """

    def __init__(
        self,
        trt: Any,
        folder: Path,
        plan: EnginePlan,
        device: torch.device,
        *,
        kernels: RuntimeCache | None = None,
        strategies: Strategies = STRATEGIES,
    ) -> None:
        """`kernels` is for the flavor that compiles while running. Raises ConfigError naming the engine that this GPU
        does not take, with TensorRT's own words.
        """
        self._trt, self._plan, self._device = trt, plan, device
        self._kernels, self._strategies = kernels, strategies
        self._log = collecting_log(trt)
        try:
            self._runtime = trt.Runtime(self._log)
        except Exception as error:  # of the bindings: which ones is not documented
            raise ConfigError(f"{folder}: {plan.flavor} TensorRT does not start here: {self._said(error)}") from None
        self._engines: dict[str, Any] = {}
        self._contexts: dict[tuple[str, int, Shapes], Any] = {}
        self._settings: list[Any] = []  # contexts refer to theirs
        self._ranks: Any = None  # NCCL's communicator
        for segment in plan.segments:
            engine = self._runtime.deserialize_cuda_engine((folder / segment.file).read_bytes())
            if engine is None:
                gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "a processor"
                made_for = ",".join(map(str, plan.compute_capabilities)) or "all that it knows"
                raise ConfigError(
                    f"{folder / segment.file}: {plan.flavor} TensorRT {trt.__version__} does not take it on {gpu}"
                    f" (built for {made_for}): {self._said('it gave no reason')}"
                )
            self._engines[segment.name] = engine
        size = max((int(engine.device_memory_size_v2) for engine in self._engines.values()), default=0)
        self._scratch = torch.empty(max(size, _ALIGNMENT), dtype=torch.uint8, device=device)
        assert self._scratch.data_ptr() % _ALIGNMENT == 0 or device.type != "cuda", "torch aligns to 512 bytes"
        self._sized = {  # inputs whose shape a step decides
            segment.name: {spec.name for spec in segment.inputs if any(isinstance(size, str) for size in spec.shape)}
            for segment in plan.segments
        }

    def run(self, segment: str, profile: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Enqueue one segment on the stream that is current. Raises RuntimeError where TensorRT refuses."""
        stream = int(torch.cuda.current_stream(self._device).cuda_stream)
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items() if name in self._sized[segment]}
        is_fixed = self._decodes(profile)
        key = segment, profile, tuple(shapes.values()) if is_fixed else ()
        context = self._contexts.get(key)
        if context is None or not is_fixed:
            context = context or self.context(segment, profile, stream)
            for name, shape in shapes.items():
                if not context.set_input_shape(name, shape):
                    raise RuntimeError(f"TensorRT refuses shape {shape} for {name} of {segment}: {self._said()}")
            self._contexts[key] = context
        for name, tensor in (*inputs.items(), *outputs.items()):
            if not context.set_tensor_address(name, tensor.data_ptr()):
                raise RuntimeError(f"TensorRT refuses the address of {name} of {segment}: {self._said()}")
        if not context.execute_async_v3(stream):
            raise RuntimeError(f"TensorRT could not run segment {segment}: {self._said()}")

    def context(self, segment: str, profile: int, stream: int) -> Any:
        """A new context for a profile, with the shared memory. Raises RuntimeError when there is none."""
        engine, strategy = self._engines[segment], self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._kernels is not None and hasattr(self._trt, "IRuntimeCache"):
            settings = engine.create_runtime_config()
            settings.set_execution_context_allocation_strategy(strategy)
            when = self._strategies["decode" if self._decodes(profile) else "prefill"]
            kinds = self._trt.DynamicShapesKernelSpecializationStrategy
            settings.dynamic_shapes_kernel_specialization_strategy = getattr(kinds, when)
            self._kernels.attach(settings)
            self._settings.append(settings)
            context = engine.create_execution_context(settings)
        else:
            context = engine.create_execution_context(strategy)
        if context is None or not context.set_optimization_profile_async(profile, stream):
            raise RuntimeError(f"TensorRT has no context for profile {profile} of {segment}: {self._said()}")
        if self._ranks is not None and not context.set_communicator(self._ranks):
            raise RuntimeError(f"TensorRT does not take NCCL's communicator for {segment}: {self._said()}")
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        return context

    def try_contexts(self) -> None:
        """A context of every engine, for no step. Raises RuntimeError where there can be none."""
        stream = int(torch.cuda.current_stream(self._device).cuda_stream)
        for segment in self._engines:
            self.context(segment, len(self._plan.profiles) - 1, stream)

    def join(self, ranks: Any) -> None:
        """Contexts that are made from now on sum over the ranks of NCCL's communicator, a capsule: each waits for those
        of all ranks to be made, and so does every run."""
        self._ranks = ranks

    def can_capture(self, stream: int) -> bool:
        """Whether all contexts of decode steps that were made so far can be captured on a stream. The flavor that does
        not know takes the attempt."""
        contexts = [context for (_, profile, _), context in self._contexts.items() if self._decodes(profile)]
        asked = [context for context in contexts if hasattr(context, "is_stream_capturable")]
        return all(context.is_stream_capturable(stream) for context in asked)

    def save(self) -> None:
        """Keep what was compiled so far for the next start."""
        if self._kernels is not None:
            self._kernels.save()

    def _decodes(self, profile: int) -> bool:
        return self._plan.profiles[profile].name.startswith("decode")

    def _said(self, otherwise: object = "") -> str:
        """TensorRT's errors since the last ones that were told."""
        errors = "; ".join(self._log.errors[:_SHOWN_ERRORS])
        self._log.errors.clear()
        return errors or str(otherwise)
