"""One request on a gRPC stream of tritonclient."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tritonclient.grpc as triton

DTYPES = {"BYTES": np.object_, "INT32": np.int32, "FP32": np.float32, "BOOL": np.bool_, "UINT64": np.uint64}


def tensor(name: str, values: Any, dtype: str, *, batched: bool = False) -> triton.InferInput:
    array = np.array(values, dtype=DTYPES[dtype])
    array = array.reshape((1, *array.shape)) if batched else array
    made = triton.InferInput(name, list(array.shape), dtype)
    made.set_data_from_numpy(array)
    return made


def text_tensor(text: str, *, batched: bool = False) -> triton.InferInput:
    return tensor("text_input", [text.encode()], "BYTES", batched=batched)


@dataclass
class Stream:
    """What came back: results, errors, and how many responses were marked final."""

    results: list[Any] = field(default_factory=list)
    errors: list[Any] = field(default_factory=list)
    num_final: int = 0

    def joined(self, name: str = "text_output") -> str:
        pieces = [result.as_numpy(name) for result in self.results]
        return "".join(piece.ravel()[0].decode() for piece in pieces if piece is not None)

    def last(self, name: str) -> Any:
        values = [value for result in self.results if (value := result.as_numpy(name)) is not None]
        return values[-1]


@contextmanager
def open_stream(address: str) -> Iterator[tuple[triton.InferenceServerClient, queue.Queue[tuple[Any, Any]]]]:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client = triton.InferenceServerClient(address)
    client.start_stream(lambda result, error: answers.put((result, error)))
    try:
        yield client, answers
    finally:
        client.stop_stream(cancel_requests=True)
        client.close()


def stream(
    address: str, model: str, inputs: list[triton.InferInput], begun: threading.Event | None = None, **request: Any
) -> Stream:
    """Send one request and collect its responses up to the final one; `begun` is set with the first."""
    collected = Stream()
    with open_stream(address) as (client, answers):
        client.async_stream_infer(model, inputs, enable_empty_final_response=True, **request)
        while True:
            result, error = answers.get(timeout=20)
            if error is not None:
                collected.errors.append(error)
                return collected
            response = result.get_response()
            if begun is not None:
                begun.set()
            if response.outputs:
                collected.results.append(result)
            if response.parameters["triton_final_response"].bool_param:
                collected.num_final += 1
                break
        # Nothing may follow the final response.
        client.stop_stream()
        collected.num_final += answers.qsize()
    return collected
