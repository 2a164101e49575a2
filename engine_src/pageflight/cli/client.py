"""A client of a running server, speaking only what any other client may speak: HTTP `generate_stream`, or gRPC."""

from __future__ import annotations

import http.client
import json
import queue
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pageflight.cli.errors import ServerError
from pageflight.core.errors import ConfigError

Answer = Mapping[str, Any]
"""One response: `text_output` (the new text) and whatever else was asked for."""

_NUMPY = {
    "BYTES": np.object_,
    "BOOL": np.bool_,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT64": np.uint64,
    "FP32": np.float32,
}
_CONNECT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where a server listens. `url` is http://host:port or grpc://host:port."""

    url: str

    @property
    def address(self) -> tuple[str, int]:
        parts = urllib.parse.urlsplit(self.url)
        try:
            port = parts.port
        except ValueError:
            port = None
        if parts.scheme not in ("http", "grpc") or not parts.hostname or port is None:
            raise ConfigError(f"url={self.url!r}: write http://HOST:PORT or grpc://HOST:PORT")
        return parts.hostname, port

    def stream(self, model: str, request: Mapping[str, Any]) -> Iterator[Answer]:
        """Responses of one streamed request, as they come. Raises ServerError with the server's message."""
        host, port = self.address
        if self.url.startswith("grpc"):
            return _grpc_stream(f"{host}:{port}", model, request)
        return _http_stream(host, port, model, request)


def is_ready(host: str, port: int) -> bool:
    """Does Triton's HTTP endpoint say that all models are ready?"""
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _http_stream(host: str, port: int, model: str, request: Mapping[str, Any]) -> Iterator[Answer]:
    connection = http.client.HTTPConnection(host, port, timeout=_CONNECT_S)
    try:
        connection.connect()
        connection.sock.settimeout(None)  # a long prompt may take its time; the connection is known to work
        body = json.dumps({**request, "stream": True})
        path = f"/v2/models/{urllib.parse.quote(model, safe='')}/generate_stream"
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise ServerError(_message(response.read(), response.status))
        for line in response:
            if line.startswith(b"data:"):
                answer = json.loads(line[5:])
                if "error" in answer:
                    raise ServerError(str(answer["error"]))
                yield answer
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(f"http://{host}:{port}", error) from None
    finally:
        connection.close()


def _message(body: bytes, status: int) -> str:
    try:
        return str(json.loads(body.strip().removeprefix(b"data:"))["error"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered with status {status}: {body[:200].decode(errors='replace')}"


def _unreachable(url: str, error: Exception) -> ServerError:
    reason = str(error) or type(error).__name__
    return ServerError(
        f"no answer from {url} ({reason}); start a server (scripts/serve, or pageflight serve REPOSITORY) or give --url"
    )


def _grpc_stream(address: str, model: str, request: Mapping[str, Any]) -> Iterator[Answer]:
    import tritonclient.grpc as triton
    from tritonclient.utils import InferenceServerException

    answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    client = triton.InferenceServerClient(address)
    try:
        metadata = client.get_model_metadata(model, client_timeout=_CONNECT_S)
        inputs = [_tensor(triton, metadata, name, value) for name, value in {**request, "stream": True}.items()]
        client.start_stream(callback=lambda result, error: answers.put((result, error)))
        client.async_stream_infer(model, inputs, enable_empty_final_response=True)
        while True:
            result, error = answers.get()
            if error is not None:
                raise error
            response = result.get_response()
            if response.outputs:
                yield {output.name: _plain(result.as_numpy(output.name)) for output in response.outputs}
            final = response.parameters.get("triton_final_response")
            if final is not None and final.bool_param:
                return
    except InferenceServerException as error:
        if "UNAVAILABLE" in str(error.status()) and "connect" in error.message().lower():
            raise _unreachable(f"grpc://{address}", error) from None
        raise ServerError(error.message()) from None
    finally:
        client.stop_stream(cancel_requests=True)
        client.close()


def _tensor(triton: Any, metadata: Any, name: str, value: Any) -> Any:
    declared = next((item for item in metadata.inputs if item.name == name), None)
    if declared is None:
        known = ", ".join(sorted(item.name for item in metadata.inputs))
        raise ServerError(f"{name}: model {metadata.name} has no such input; it has {known}")
    values = value if isinstance(value, list) else [value]
    if declared.datatype == "BYTES":
        values = [str(item).encode() for item in values]
    array = np.array(values, _NUMPY[declared.datatype])
    if len(declared.shape) == 2:  # batched models have a leading batch axis
        array = array[None]
    tensor = triton.InferInput(name, list(array.shape), declared.datatype)
    tensor.set_data_from_numpy(array)
    return tensor


def _plain(array: Any) -> Any:
    """A tensor as JSON would hold it; one element alone without its list."""
    values = [item.decode(errors="replace") if isinstance(item, bytes) else item for item in array.ravel().tolist()]
    return values[0] if len(values) == 1 else values
