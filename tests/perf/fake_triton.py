"""Triton's gRPC service with a model that answers 7, 7, 7 …: enough of it to drive the client."""

from __future__ import annotations

import contextlib
import queue
import struct
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc


@dataclass
class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers requests of a stream in rounds, one token each, as in-flight batching does."""

    takes_text: bool = False
    missing_tokens: int = 0  # how many fewer tokens than asked for
    empty_final: bool = False
    error: str = ""
    skip_finals: bool = False
    max_open: int = field(default=0, init=False)
    seen: list[dict[str, Any]] = field(default_factory=list, init=False)

    def ModelMetadata(self, request: Any, context: Any) -> Any:
        if request.name != "engine":
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        response = service_pb2.ModelMetadataResponse(name=request.name)
        if self.takes_text:
            inputs = {"text_input": "BYTES", "max_tokens": "INT32", "stream": "BOOL"}
        else:
            inputs = {"input_ids": "INT32", "input_lengths": "INT32", "request_output_len": "INT32"}
            inputs["streaming"] = "BOOL"
        inputs |= {"ignore_eos": "BOOL", "return_num_input_tokens": "BOOL", "return_num_output_tokens": "BOOL"}
        for name, datatype in inputs.items():
            shape = [-1, -1] if name == "input_ids" else [1] if self.takes_text else [-1, 1]
            response.inputs.add(name=name, datatype=datatype, shape=shape)
        for name in ("text_output", "output_ids", "sequence_length", "num_input_tokens", "num_output_tokens"):
            response.outputs.add(name=name, datatype="INT32", shape=[-1])
        return response

    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def receive() -> None:
            with contextlib.suppress(grpc.RpcError):  # the client hung up
                for request in requests:
                    arrived.put(request)
            arrived.put(None)

        threading.Thread(target=receive, daemon=True).start()
        open_requests: dict[str, dict[str, Any]] = {}
        while True:
            while not arrived.empty() or not open_requests:
                if (request := arrived.get()) is None:
                    return
                open_requests[request.id] = self._read(request)
            time.sleep(0.001)  # a step
            self.max_open = max(self.max_open, len(open_requests))
            for number, state in list(open_requests.items()):
                if self.error:
                    refused = service_pb2.ModelInferResponse(id=number)
                    yield service_pb2.ModelStreamInferResponse(error_message=self.error, infer_response=refused)
                    return
                state["done"] += 1
                is_last = state["done"] == state["wanted"] - self.missing_tokens
                yield self._token(number, state, is_final=is_last and not self.empty_final and not self.skip_finals)
                if is_last and self.skip_finals:
                    return
                if is_last:
                    del open_requests[number]
                if is_last and self.empty_final:
                    response = service_pb2.ModelInferResponse(id=number)
                    response.parameters["triton_final_response"].bool_param = True
                    yield service_pb2.ModelStreamInferResponse(infer_response=response)

    def _read(self, request: Any) -> dict[str, Any]:
        raw = {tensor.name: data for tensor, data in zip(request.inputs, request.raw_input_contents, strict=True)}
        shapes = {tensor.name: list(tensor.shape) for tensor in request.inputs}
        self.seen.append({"raw": raw, "shapes": shapes, "id": request.id})
        length = "max_tokens" if self.takes_text else "request_output_len"
        prompt = raw["text_input"][4:] if self.takes_text else raw["input_ids"]
        return {"wanted": struct.unpack("<i", raw[length])[0], "done": 0, "prompt": len(prompt) // 4}

    def _token(self, number: str, state: dict[str, Any], *, is_final: bool) -> Any:
        response = service_pb2.ModelInferResponse(id=number, model_name="engine")
        for name, value in (
            ("output_ids", 7),
            ("num_input_tokens", state["prompt"]),
            ("num_output_tokens", state["done"]),
        ):
            response.outputs.add(name=name, datatype="INT32", shape=[1])
            response.raw_output_contents.append(struct.pack("<i", value))
        response.parameters["triton_final_response"].bool_param = is_final
        return service_pb2.ModelStreamInferResponse(infer_response=response)


class Served:
    """A FakeTriton on a free port, for the length of a `with` block; `address` is where."""

    def __init__(self, fake: FakeTriton) -> None:
        self.fake = fake
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, self._server)
        self.address = f"localhost:{self._server.add_insecure_port('localhost:0')}"

    def __enter__(self) -> Served:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(grace=None).wait()
