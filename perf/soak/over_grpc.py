"""Errands over gRPC streams: one call for each, on a connection of the client's own."""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping
from typing import Any

import grpc  # type: ignore[import-untyped]
import numpy as np
from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor

from perf.soak.ended import Ended
from perf.soak.errand import Ask, Ending, Errand, Target
from perf.wire import NUMPY_TYPES, SERVICE, UNLIMITED, Model

_OWN_CONNECTION = ("grpc.use_local_subchannel_pool", 1)  # otherwise all channels of a process share one
_ENGINE_SPELLINGS = {"top_k": "runtime_top_k", "top_p": "runtime_top_p"}
_MOMENT_S = 0.02
"""What a client that leaves before the first response waits, so that there is something to leave."""


class GrpcClient:
    """`models` by name; how long a call may take is `hang_limit_s`."""

    def __init__(self, address: str, models: Mapping[str, Model], *, name: str, hang_limit_s: float) -> None:
        self._address, self._models, self._name, self._hang_limit_s = address, models, name, hang_limit_s
        self._channel = self._connected()

    def close(self) -> None:
        self._channel.close()

    def run(self, errand: Errand) -> Ended:
        model = self._models[errand.target.model(self._name)]
        values = dict(errand.fault.values) if errand.fault is not None else wishes(errand.ask, errand.target)
        ended = Ended(started_s=time.monotonic())
        outbox, call = self._call(model.message(str(errand.number), values))
        try:
            self._read(call, errand, ended)
            outbox.put(None)
            if not ended.has_left:
                ended.num_after_final = sum(1 for _ in call)
        except StopIteration:
            pass  # without a final response: the judge will see
        except grpc.RpcError as error:
            ended.has_hung = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            ended.error = f"{error.code().name}: {error.details()}"
        finally:
            outbox.put(None)
            call.cancel()
            ended.ended_s = time.monotonic()
        return ended

    def _read(self, call: Any, errand: Errand, ended: Ended) -> None:
        """Up to the final response, an error, or the end that the client makes."""
        has_acted = errand.ending is Ending.WAIT
        while not ended.num_finals and ended.error is None:
            if not has_acted and ended.num_responses >= errand.after:
                has_acted = True
                time.sleep(_MOMENT_S)
                if errand.ending is Ending.STOP:
                    self._stop(errand, ended)
                else:
                    ended.has_left = True
                    if errand.ending is Ending.DISCONNECT:
                        self._channel.close()
                        self._channel = self._connected()
                    return
            _take(next(call), ended)

    def _stop(self, errand: Errand, ended: Ended) -> None:
        """Cancel by TensorRT-LLM's tensor. That the request has just ended by itself is an answer like any other."""
        values = {"input_ids": (1,), "input_lengths": 1, "request_output_len": 1, "stop": True}
        outbox, call = self._call(self._models["engine"].message(str(errand.number), values))
        outbox.put(None)
        try:
            for response in call:
                if not response.error_message:
                    ended.num_stop_replies += 1
        finally:
            call.cancel()

    def _call(self, message: service_pb2.ModelInferRequest) -> tuple[queue.SimpleQueue[Any], Any]:
        """An open stream that has the message, and the queue for further ones; None there ends our half of it."""
        outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        outbox.put(message)
        open_stream = self._channel.stream_stream(
            f"{SERVICE}/ModelStreamInfer",
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )
        return outbox, open_stream(iter(outbox.get, None), timeout=self._hang_limit_s, wait_for_ready=True)

    def _connected(self) -> grpc.Channel:
        return grpc.insecure_channel(self._address, options=[*UNLIMITED, _OWN_CONNECTION])


def wishes(ask: Ask, target: Target) -> dict[str, object]:
    """The ask in the tensors of a model."""
    if target is Target.ENGINE:
        prompt = ask.prompt
        values: dict[str, object] = {"input_ids": prompt, "input_lengths": len(prompt), "streaming": True}
        values["request_output_len"] = ask.max_tokens
    else:
        values = {"text_input": ask.prompt, "max_tokens": ask.max_tokens, "stream": True}
    spelt = _ENGINE_SPELLINGS if target is Target.ENGINE else {}
    return {**{spelt.get(name, name): value for name, value in ask.options}, **values, "return_finish_reason": True}


def _take(message: service_pb2.ModelStreamInferResponse, ended: Ended) -> None:
    response = message.infer_response
    if message.error_message:
        ended.error = message.error_message
        return
    ended.num_finals += response.parameters["triton_final_response"].bool_param
    if not response.outputs:
        return
    ended.num_responses += 1
    found = {
        output.name: _array(output.datatype, raw)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }
    first = int(found["sequence_index"][0]) if "sequence_index" in found else 0
    texts = found.get("text_output", [])
    reasons = list(found.get("finish_reason", [])) or [None] * len(texts)
    for sequence, (text, reason) in enumerate(zip(texts, reasons, strict=True), start=first):
        ended.add(sequence, text.decode(), None if reason is None else reason.decode())


def _array(datatype: str, raw: bytes) -> Any:
    if datatype == "BYTES":
        return list(deserialize_bytes_tensor(raw))
    return np.frombuffer(raw, NUMPY_TYPES[datatype])
