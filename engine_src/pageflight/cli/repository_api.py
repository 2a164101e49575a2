"""Loading and unloading models of a running tritonserver: its repository API, which only who knows the key may use."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from pageflight.cli.errors import ServerError

_HEADER = "pageflight-key"
_TIMEOUT_S = 10.0
_LOAD_TIMEOUT_S = 1800.0
"""A large engine from a slow disk takes its time."""


class ServerOrders(Protocol):
    """What the watchdog asks of a server. Every method raises ServerError with the server's message."""

    def unload(self, model: str) -> None:
        """Take a model out of service; returns at once. What it has open may finish."""

    def load(self, model: str) -> None:
        """Load a model, and the ensembles that use it; returns when it is ready."""

    def num_successes(self, model: str) -> int:
        """Requests that the model's stubs have taken over since it was loaded."""

    def infer(self, model: str, tensor: str, text: str, parameters: dict[str, str]) -> None:
        """A request whose answer does not matter, only that it was answered: `tensor` is a string of shape [1, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryApi:
    """`ServerOrders` to the server at `address`, host:port of its gRPC: over HTTP a load holds up other requests."""

    address: str
    key: str = ""

    @property
    def arguments(self) -> tuple[str, ...]:
        """What makes a tritonserver load all models at its start and take orders from this API alone.

        Without the key anybody who reaches a port could load a model of his own, which is to run his code.
        """
        restricted = f"model-repository:{_HEADER}={self.key}"
        return (
            "--model-control-mode=explicit",
            "--load-model=*",
            f"--http-restricted-api={restricted}",
            f"--grpc-restricted-protocol={restricted}",
        )

    def unload(self, model: str) -> None:
        with self._client() as (client, headers):
            client.unload_model(model, headers=headers, client_timeout=_TIMEOUT_S)

    def load(self, model: str) -> None:
        with self._client() as (client, headers):
            client.load_model(model, headers=headers, client_timeout=_LOAD_TIMEOUT_S)

    def num_successes(self, model: str) -> int:
        with self._client() as (client, _):
            statistics = client.get_inference_statistics(model, client_timeout=_TIMEOUT_S)
            return sum(int(version.inference_stats.success.count) for version in statistics.model_stats)

    def infer(self, model: str, tensor: str, text: str, parameters: dict[str, str]) -> None:
        import numpy as np
        import tritonclient.grpc as triton

        with self._client() as (client, _):
            given = triton.InferInput(tensor, [1, 1], "BYTES")
            given.set_data_from_numpy(np.array([[text.encode()]], dtype=np.object_))
            client.infer(model, [given], parameters=parameters, client_timeout=_TIMEOUT_S)

    @contextmanager
    def _client(self) -> Iterator[tuple[Any, dict[str, str]]]:
        import tritonclient.grpc as triton
        from tritonclient.utils import InferenceServerException

        client = triton.InferenceServerClient(self.address)
        try:
            yield client, {f"triton-grpc-protocol-{_HEADER}": self.key} if self.key else {}
        except InferenceServerException as error:
            raise ServerError(error.message()) from None
        finally:
            client.close()


def new_key() -> str:
    return secrets.token_hex(16)
