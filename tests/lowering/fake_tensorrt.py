"""The runtime half of tensorrt_rtx, as far as it is used: it notes what is asked of it, and computes nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import tensorrt_rtx as trt


class FakeTensorRt:
    """Stands in for the module. `sizes`: memory that each engine's contexts need, in bytes."""

    __version__ = "1.7"
    ILogger = trt.ILogger
    IRuntimeCache = trt.IRuntimeCache
    ExecutionContextAllocationStrategy = trt.ExecutionContextAllocationStrategy
    DynamicShapesKernelSpecializationStrategy = trt.DynamicShapesKernelSpecializationStrategy

    def __init__(self, sizes: dict[str, int] | None = None, *, accepts: bool = True, refuses: str = "") -> None:
        self.sizes, self.accepts, self.refuses = sizes or {}, accepts, refuses
        self.calls: list[tuple[Any, ...]] = []
        self.caches: list[bytes] = []
        self.settings: list[Any] = []
        self.contexts: list[Any] = []
        self.uncapturable: set[str] | None = set()
        """Engines whose contexts cannot be captured; None: a flavor that cannot be asked."""
        self.hides: BaseException | None = None
        """What serialising a cache raises."""
        self.refuses_ranks = False
        self.is_mute = False  # serialising a cache gives nothing

    def Runtime(self, log: Any) -> Any:
        def deserialize_cuda_engine(data: bytes) -> Any:
            if self.refuses:
                log.log(trt.ILogger.Severity.ERROR, self.refuses)
                return None
            return _Engine(self, data.decode())

        return SimpleNamespace(deserialize_cuda_engine=deserialize_cuda_engine)


class _Engine:
    def __init__(self, fake: FakeTensorRt, name: str) -> None:
        self._fake, self.name = fake, name
        self.device_memory_size_v2 = fake.sizes.get(name, 0)

    def create_runtime_config(self) -> Any:
        self._fake.calls.append(("create_runtime_config",))
        made = _Settings(self._fake)
        self._fake.settings.append(made)
        return made

    def create_execution_context(self, how: Any) -> Any:
        self._fake.calls.append(("create_execution_context", how))
        self._fake.contexts.append(_Context(self._fake, self.name))
        return self._fake.contexts[-1]


class _Settings:
    def __init__(self, fake: FakeTensorRt) -> None:
        self._fake, self.dynamic_shapes_kernel_specialization_strategy = fake, None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        assert strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED

    def create_runtime_cache(self) -> Any:
        self._fake.calls.append(("create_runtime_cache",))
        self._fake.caches.append(b"")
        return _Cache(self._fake)

    def set_runtime_cache(self, cache: Any) -> bool:
        self._fake.calls.append(("set_runtime_cache",))
        return True


class _Cache:
    def __init__(self, fake: FakeTensorRt) -> None:
        self._fake = fake

    def deserialize(self, data: bytes) -> bool:
        self._fake.calls.append(("deserialize", data))
        if self._fake.accepts:
            self._fake.caches[0] = data
        return self._fake.accepts

    def serialize(self) -> bytes | None:
        if self._fake.hides:
            raise self._fake.hides
        return None if self._fake.is_mute else self._fake.caches[0]


class _Context:
    def __init__(self, fake: FakeTensorRt, name: str) -> None:
        self._fake, self._name = fake, name
        self.shapes: list[tuple[int, ...]] = []  # that it was given, one after the other

    def __getattr__(self, call: str) -> Any:
        if call == "is_stream_capturable" and self._fake.uncapturable is None:
            raise AttributeError(call)

        def note(*arguments: Any) -> bool:
            self._fake.calls.append((call, *arguments))
            if call == "is_stream_capturable":
                return self._name not in (self._fake.uncapturable or ())
            if call == "set_communicator":
                return not self._fake.refuses_ranks
            if call == "set_input_shape":
                self.shapes.append(arguments[1])
            kernels = f"kernels of {self._name};".encode()
            if call == "execute_async_v3" and self._fake.caches and kernels not in self._fake.caches[0]:
                self._fake.caches[0] += kernels
            return True

        return note
