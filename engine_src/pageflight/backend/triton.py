"""Triton's Python backend as this package uses it: the one module that imports `triton_python_backend_utils`.

Facts about the backend of tritonserver 2.51, measured, that shape the callers: a response costs 50 to 120 µs however
many tensors it has; asking whether a request was cancelled costs 30 to 60 µs; so does a metric operation, and one that
its kind does not support can take the whole server down. Triton fills the module with its classes after it has imported
the model, so nothing of it is touched at import.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import triton_python_backend_utils as pb
from numpy.typing import NDArray

from pageflight.core.errors import PageflightError, status_of
from pageflight.obs.exporter import Kind, Metric

log = logging.getLogger(__name__)

FINAL: int = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL
MORE = 0

TritonTensor = Any
TritonResponse = Any


class Sender(Protocol):
    """A request's way back. After a response with FINAL neither method may be called again."""

    def send(self, response: TritonResponse = None, flags: int = 0) -> None: ...

    def is_cancelled(self) -> bool: ...


class InputTensor(Protocol):
    def name(self) -> str: ...

    def as_numpy(self) -> NDArray[Any]: ...


class TritonRequest(Protocol):
    def inputs(self) -> Sequence[InputTensor]: ...

    def parameters(self) -> str: ...

    def request_id(self) -> str: ...

    def timeout(self) -> int: ...

    def correlation_id(self) -> int | str: ...

    def requested_output_names(self) -> Iterable[str]: ...

    def get_response_sender(self) -> Sender: ...


def tensor(name: str, array: NDArray[Any]) -> TritonTensor:
    """An output. Strings are object arrays of bytes."""
    return pb.Tensor(name, array)


def strings(name: str, texts: Sequence[str], *, shape: tuple[int, ...] | None = None) -> TritonTensor:
    """A string output of `texts`; a flat one unless `shape` is given."""
    array = np.array([text.encode("utf-8", "replace") for text in texts], dtype=np.object_)
    return pb.Tensor(name, array if shape is None else array.reshape(shape))


def response(tensors: Sequence[TritonTensor]) -> TritonResponse:
    return pb.InferenceResponse(tensors)


def error_response(error: PageflightError) -> TritonResponse:
    """The error as Triton sends it, with the code of the one table of errors."""
    code = getattr(pb.TritonError, status_of(error).triton)
    return pb.InferenceResponse([], pb.TritonError(str(error), code))


def start_error(model: str, error: PageflightError) -> Exception:
    """What `initialize` raises so that the server shows the reason and no traceback.

    The reason goes to the log here as well: several models failing at once have brought the server down before it
    could tell.
    """
    log.error("failed to load '%s': %s: %s", model, type(error).__name__, error)
    failure: Exception = pb.TritonModelException(f"{type(error).__name__}: {error}")
    return failure


class TritonExporter:
    """`obs.exporter.Exporter` on Triton's `/metrics`.

    `close` must be called from `finalize`: a series that lives longer is deleted when the exchange with the server is
    gone already, which ends the stub with a segmentation fault.
    """

    def __init__(self) -> None:
        self._families: dict[str, Any] = {}
        self._series: dict[tuple[str, tuple[tuple[str, str], ...]], _Series] = {}

    def metric(
        self, kind: Kind, name: str, description: str, labels: Mapping[str, str], buckets: Sequence[float] = ()
    ) -> Metric:
        key = (name, tuple(sorted(labels.items())))
        if key not in self._series:
            extra = {"buckets": list(buckets)} if buckets else {}

            def make() -> Any:
                if name not in self._families:
                    triton_kind = getattr(pb.MetricFamily, kind.upper())
                    self._families[name] = pb.MetricFamily(name=name, description=description, kind=triton_kind)
                return self._families[name].Metric(labels=dict(labels), **extra)

            self._series[key] = _Series(make)
        return self._series[key]

    def close(self) -> None:
        """Delete every series, then the families. Nothing may be published any more."""
        for series in self._series.values():
            series.close()
        self._series.clear()
        self._families.clear()


class _Series:
    """A `Metric` that is made when it is first needed."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make: Callable[[], Any] | None = make
        self._metric: Any = None

    def publish(self) -> None:
        if self._metric is None:
            assert self._make is not None, "published after the end"
            self._metric = self._make()

    def increment(self, value: float) -> None:
        self.publish()
        self._metric.increment(value)

    def set(self, value: float) -> None:
        self.publish()
        self._metric.set(value)

    def observe(self, value: float) -> None:
        self.publish()
        self._metric.observe(value)

    def close(self) -> None:
        self._metric = self._make = None
