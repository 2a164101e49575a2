"""The least that a streaming model can do in Triton's Python backend: one thread sends, nothing is computed.

A response has the tensors of the `engine` model that `perf.wire` asks for. What this model reaches is what the server,
its Python backend and the client allow on a machine.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Answers every request with `request_output_len` responses, all open requests in turn."""

    def initialize(self, args: dict[str, str]) -> None:
        self._arrived: queue.SimpleQueue[tuple[Any, int, int] | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send, daemon=True)
        self._sender.start()

    def execute(self, requests: Sequence[Any]) -> None:
        for request in requests:
            count = int(pb_utils.get_input_tensor_by_name(request, "request_output_len").as_numpy().ravel()[0])
            num_input = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy().size
            self._arrived.put((request.get_response_sender(), count, num_input))

    def _send(self) -> None:
        is_open = True
        answers: list[list[Any]] = []  # sender, responses left, prompt tokens, responses sent
        while is_open or answers:
            while is_open and (not answers or not self._arrived.empty()):
                arrived = self._arrived.get()
                if arrived is None:
                    is_open = False
                else:
                    answers.append([*arrived, 0])
            for answer in answers:
                sender, left, num_input, num_sent = answer
                tensors = [
                    pb_utils.Tensor("text_output", np.array([b" word"], np.object_)),
                    pb_utils.Tensor("num_input_tokens", np.array([num_input], np.int32)),
                    pb_utils.Tensor("num_output_tokens", np.array([num_sent + 1], np.int32)),
                ]
                flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if left == 1 else 0
                sender.send(pb_utils.InferenceResponse(output_tensors=tensors), flags=flags)
                answer[1], answer[3] = left - 1, num_sent + 1
            answers = [answer for answer in answers if answer[1]]

    def finalize(self) -> None:
        self._arrived.put(None)
        self._sender.join()
