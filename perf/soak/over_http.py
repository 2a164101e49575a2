"""Errands over HTTP: `generate`, `generate_stream`, and connections that break off."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import time
from typing import Any

from perf.soak.ended import Ended
from perf.soak.errand import Ending, Errand, Via

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing resets the connection


class HttpClient:
    """Every request has a connection of its own."""

    def __init__(self, host: str, port: int, *, name: str, hang_limit_s: float) -> None:
        self._host, self._port, self._name, self._hang_limit_s = host, port, name, hang_limit_s

    def run(self, errand: Errand) -> Ended:
        ended = Ended(started_s=time.monotonic())
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._hang_limit_s)
        try:
            self._send(connection, errand)
            if errand.via is Via.HTTP and errand.ending is Ending.DISCONNECT:
                time.sleep(0.05)
                self._break_off(connection, ended)
                return ended
            response = connection.getresponse()
            ended.status = response.status
            if errand.via is Via.SSE:
                self._stream(connection, response, errand, ended)
            else:
                _take(json.loads(response.read()), ended)
        except TimeoutError:
            ended.has_hung = True
        except (OSError, http.client.HTTPException, ValueError) as error:
            ended.error = f"{type(error).__name__}: {error}"
        finally:
            connection.close()
            ended.ended_s = time.monotonic()
        return ended

    def _send(self, connection: http.client.HTTPConnection, errand: Errand) -> None:
        method, model, body = "generate", errand.target.model(self._name), b""
        if errand.fault is not None:
            method, model, body = errand.fault.method, errand.fault.model or model, errand.fault.body
        else:
            values = {**dict(errand.ask.options), "text_input": errand.ask.prompt, "max_tokens": errand.ask.max_tokens}
            values["return_finish_reason"] = True
            if errand.via is Via.SSE:
                values["stream"] = True
            body = json.dumps(values).encode()
        path = f"/v2/models/{model}/{'generate_stream' if errand.via is Via.SSE else method}"
        connection.request("POST", path, body, {"Content-Type": "application/json", "Connection": "close"})

    def _stream(
        self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse, errand: Errand, ended: Ended
    ) -> None:
        until_s = ended.started_s + self._hang_limit_s
        for line in response:
            if not line.startswith(b"data:"):
                if line.strip():
                    _take(json.loads(line), ended)  # Triton's own refusals are no events
                continue
            _take(json.loads(line[5:]), ended)
            if errand.ending is Ending.DISCONNECT and ended.num_responses > errand.after:
                self._break_off(connection, ended)
                return
            if time.monotonic() > until_s:
                raise TimeoutError

    @staticmethod
    def _break_off(connection: http.client.HTTPConnection, ended: Ended) -> None:
        ended.has_left = True
        if isinstance(connection.sock, socket.socket):
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            connection.sock.close()


def _take(answer: Any, ended: Ended) -> None:
    if "error" in answer:
        ended.error = str(answer["error"])
        return
    ended.num_responses += 1
    texts = _listed(answer.get("text_output", []))
    reasons = _listed(answer.get("finish_reason", [])) or [None] * len(texts)
    first = int(answer.get("sequence_index", 0))
    for sequence, (text, reason) in enumerate(zip(texts, reasons, strict=True), start=first):
        ended.add(sequence, text, reason)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
