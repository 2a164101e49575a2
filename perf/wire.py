"""A client of Triton's gRPC stream that costs as little as possible: it shares its cores with the server it measures.

Requests are serialised before the clock starts, all of them travel over one bidirectional stream, and of every response
only the id, the final mark and two counters are looked at.
"""

from __future__ import annotations

import queue
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import grpc  # type: ignore[import-untyped]
import numpy as np
from tritonclient.grpc import service_pb2

from perf.figures import Answer

SERVICE = "/inference.GRPCInferenceService"
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
NUMPY_TYPES = {
    "BOOL": np.bool_,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT64": np.uint64,
    "FP32": np.float32,
}
COUNTERS = ("num_input_tokens", "num_output_tokens")


class WireError(Exception):
    """The server refused a request, or answered in a way that the contract rules out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A Triton model as its metadata describes it: what its tensors are called, and their types and shapes."""

    name: str
    inputs: Mapping[str, tuple[str, tuple[int, ...]]]  # name → Triton's type, shape (batch dimension included)
    outputs: frozenset[str]

    @classmethod
    def ask(cls, channel: grpc.Channel, name: str, *, timeout_s: float) -> Model:
        """Waits until the server answers. Raises WireError when it does not in time or has no such model."""
        call = channel.unary_unary(
            f"{SERVICE}/ModelMetadata",
            request_serializer=service_pb2.ModelMetadataRequest.SerializeToString,
            response_deserializer=service_pb2.ModelMetadataResponse.FromString,
        )
        request = service_pb2.ModelMetadataRequest(name=name)
        try:
            metadata = call(request, timeout=timeout_s, wait_for_ready=True)
        except grpc.RpcError as error:
            raise WireError(f"model {name}: {error.details()}") from None
        return cls(
            name=name,
            inputs={tensor.name: (tensor.datatype, tuple(tensor.shape)) for tensor in metadata.inputs},
            outputs=frozenset(tensor.name for tensor in metadata.outputs),
        )

    @property
    def takes_text(self) -> bool:
        """Text in (`text_input`), or token ids (`input_ids`)?"""
        return "text_input" in self.inputs

    def request(self, number: int, prompt: str | Sequence[int], num_output: int) -> bytes:
        """One serialised request for exactly `num_output` greedy tokens; its id is its number.

        Raises WireError if the model lacks a tensor that this needs.
        """
        if self.takes_text:
            values: dict[str, object] = {"text_input": prompt, "max_tokens": num_output, "stream": True}
        else:
            values = {
                "input_ids": prompt,
                "input_lengths": len(prompt),
                "request_output_len": num_output,
                "streaming": True,
            }
        values |= {"ignore_eos": True, "return_num_input_tokens": True, "return_num_output_tokens": True}
        message = self.message(str(number), values)
        for name in ("text_output", *COUNTERS):  # what every other server is asked for: text, and how much of it
            if name not in self.outputs:
                raise WireError(f"model {self.name} has no output {name}; it has {', '.join(sorted(self.outputs))}")
            message.outputs.add(name=name)
        raw: bytes = message.SerializeToString()
        return raw

    def message(self, request_id: str, values: Mapping[str, object]) -> service_pb2.ModelInferRequest:
        """A request with these tensors, for a stream. Raises WireError if the model lacks one of them."""
        message = service_pb2.ModelInferRequest(model_name=self.name, id=request_id)
        message.parameters["triton_enable_empty_final_response"].bool_param = True
        for name, value in values.items():
            if name not in self.inputs:
                raise WireError(f"model {self.name} has no input {name}; it has {', '.join(sorted(self.inputs))}")
            self._add_input(message, name, value)
        return message

    def _add_input(self, message: service_pb2.ModelInferRequest, name: str, value: object) -> None:
        datatype, shape = self.inputs[name]
        if datatype == "BYTES":
            texts = [text.encode() for text in ([value] if isinstance(value, str) else cast(Sequence[str], value))]
            raw, count = b"".join(struct.pack("<I", len(text)) + text for text in texts), len(texts)
        else:
            array: np.ndarray[Any, np.dtype[Any]] = np.atleast_1d(np.asarray(value, NUMPY_TYPES[datatype]))
            raw, count = array.tobytes(), array.size
        message.inputs.add(name=name, datatype=datatype, shape=[1] * (len(shape) - 1) + [count])
        message.raw_input_contents.append(raw)


class Stream:
    """One open ModelStreamInfer call."""

    def __init__(self, address: str, *, timeout_s: float = 600.0) -> None:
        """`timeout_s` bounds the whole life of the stream: a server that hangs ends in an error, not in a wait."""
        self.channel = grpc.insecure_channel(address, options=UNLIMITED)
        self._timeout_s = timeout_s

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.channel.close()

    def drive(self, requests: Sequence[bytes], concurrency: int) -> list[Answer]:
        """Sends all requests, `concurrency` of them open at any time; their answers in the order of the requests.

        Raises WireError at the first refusal or broken promise (no token, or no final response).
        """
        outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        responses = self.channel.stream_stream(f"{SERVICE}/ModelStreamInfer")(
            iter(outbox.get, None), timeout=self._timeout_s
        )
        answers: list[Answer] = []
        parse = service_pb2.ModelStreamInferResponse.FromString

        def send_next() -> int:
            """How many more requests are open now: 1, or 0 when all have been sent."""
            if len(answers) == len(requests):
                return 0
            answers.append(Answer(time.perf_counter()))
            outbox.put(requests[len(answers) - 1])
            return 1

        try:
            num_open = sum(send_next() for _ in range(concurrency))
            while num_open:
                message = parse(next(responses))
                now_s = time.perf_counter()
                response = message.infer_response
                if message.error_message:
                    raise WireError(f"request {response.id or '?'}: {message.error_message}")
                is_final = response.parameters["triton_final_response"].bool_param
                if is_final:
                    num_open += send_next() - 1
                answer = answers[int(response.id)]
                if response.outputs:
                    answer.arrivals_s.append(now_s)
                    self._count(response, answer)
                if is_final and not answer.arrivals_s:
                    raise WireError(f"request {response.id} ended without a token")
        except StopIteration:
            raise WireError(f"the server closed the stream while {num_open} requests were open") from None
        except grpc.RpcError as error:
            raise WireError(f"the stream broke: {error.code().name}: {error.details()}") from None
        finally:
            outbox.put(None)
            responses.cancel()
        return answers

    @staticmethod
    def _count(response: service_pb2.ModelInferResponse, answer: Answer) -> None:
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
            if output.name == "num_output_tokens":
                answer.num_output = int.from_bytes(raw[:4], "little")
            elif output.name == "num_input_tokens":
                answer.num_input = int.from_bytes(raw[:4], "little")


def prompts_as_text(prompts: Sequence[Sequence[int]], tokenizer_json: str) -> Iterator[str]:
    """Token ids decoded with a tokenizer.json. Encoding them again need not give as many tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_json)
    for prompt in prompts:
        yield tokenizer.decode(list(prompt), skip_special_tokens=False)
