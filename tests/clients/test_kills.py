"""Engine cores killed under the load of a real server: nobody but the clock notices."""

from __future__ import annotations

import os
import queue
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tritonclient.grpc as triton
from grpc_stream import open_stream, tensor
from servers import Server, running_server, wait_for

from pageflight.loop.address import instance_address
from pageflight.loop.status import CoreStatus, read_status

NAME = "tiny"
NUM_STREAMS = 64  # on 32 rows: half of them wait
NUM_KILLS = 20
NUM_TOKENS = 160
OUTPUTS = ("sequence_index", "sequence_length", "output_ids", "text_output", "output_log_probs", "finish_reason")


@pytest.fixture(scope="module")
def mortal_server(repository: tuple[Path, int]) -> Iterator[Server]:
    folder, vocab_size = repository
    with running_server(folder, NAME, vocab_size) as running:
        yield running


@dataclass
class Answer:
    """What one client has got: pieces of text and of ids, in their order."""

    text: dict[int, str] = field(default_factory=dict)  # by sequence, as are the others
    ids: dict[int, list[int]] = field(default_factory=dict)
    log_probs: dict[int, list[float]] = field(default_factory=dict, compare=False)
    reasons: dict[int, str] = field(default_factory=dict)
    num_final: int = 0


class Client:
    """Sends `NUM_STREAMS` requests over one gRPC stream and takes their pieces apart by request id."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.answers = [Answer() for _ in range(NUM_STREAMS)]
        self.num_ids = 0

    @contextmanager
    def asking(self) -> Iterator[Client]:
        with open_stream(self._server.grpc) as (stub, arrived):
            self._arrived: queue.Queue[tuple[triton.InferResult | None, Exception | None]] = arrived
            for number in range(NUM_STREAMS):
                stub.async_stream_infer(
                    "engine", inputs(number), request_id=str(number), enable_empty_final_response=True
                )
            yield self

    def read(self, *, until_ids: int | None = None) -> None:
        """Take what comes, until so many ids have come in all, or every answer is complete."""
        while any(answer.num_final == 0 for answer in self.answers):
            if until_ids is not None and self.num_ids >= until_ids:
                return
            result, error = self._arrived.get(timeout=60)
            assert error is None, error
            self._take(result)

    def _take(self, result: triton.InferResult) -> None:
        response = result.get_response()
        answer = self.answers[int(response.id)]
        assert not answer.num_final, "something came after the final response"
        if response.outputs:
            index, length, ids, text, log_probs, reason = (result.as_numpy(name) for name in OUTPUTS)
            number = 0 if index is None else int(index.ravel()[0])
            answer.ids.setdefault(number, []).extend(ids.ravel()[: length.ravel()[0]].tolist())
            answer.text[number] = answer.text.get(number, "") + text.ravel()[0].decode()
            answer.log_probs.setdefault(number, []).extend([] if log_probs is None else log_probs.ravel().tolist())
            answer.reasons[number] = answer.reasons.get(number, "") + (
                "" if reason is None else reason.ravel()[0].decode()
            )
            self.num_ids += int(length.ravel()[0])
        answer.num_final += response.parameters["triton_final_response"].bool_param


def inputs(number: int) -> list[triton.InferInput]:
    """Prompts of different lengths, greedy and sampled; some with stop words, log probabilities or two answers. The
    longest go through all kills."""
    chance = random.Random(number)
    prompt = [chance.randrange(5, 300) for _ in range(4 + 3 * (number % 11))]
    num_answers = 2 if number % 8 == 5 else 1
    length = (NUM_TOKENS - 2 * (number % 7)) // num_answers
    wishes: list[tuple[str, object, str]] = [
        ("input_ids", prompt, "INT32"),
        ("request_output_len", [length], "INT32"),
        ("num_return_sequences", [num_answers], "INT32"),
        ("return_log_probs", [number % 3 == 0], "BOOL"),
        ("streaming", [True], "BOOL"),
        ("ignore_eos", [True], "BOOL"),
        ("return_finish_reason", [True], "BOOL"),
        ("seed", [number], "UINT64"),
        ("temperature", [float(number % 2)], "FP32"),
        ("repetition_penalty", [1.1 if number % 4 == 3 else 1.0], "FP32"),
    ]
    if number % 4 == 2 or number % 8 == 5:
        words = [chance.randrange(5, 300) for _ in range(4)]
        wishes += [("stop_words_list", [words, [1, 2, 3, 4]], "INT32"), ("min_tokens", [length // 2], "INT32")]
    return [tensor(name, value, dtype, batched=True) for name, value, dtype in wishes]


def core_of(server: Server, folder: Path) -> CoreStatus:
    status = read_status(instance_address(folder, "engine", 0, server_pid=server.process.pid).status)
    assert status is not None
    return status


def counted(server: Server, name: str) -> float:
    return sum(value for series, value in server.metrics().items() if series.partition("{")[0] == name)


def test_twenty_kills_change_no_character(mortal_server: Server, repository: tuple[Path, int]) -> None:
    """64 streams and a core that dies at random moments: nothing is lost, doubled or taken back, in fp32 not even in
    the last digit of a near-tie."""
    folder, chance = repository[0], random.Random(11)
    calm, shaken = Client(mortal_server), Client(mortal_server)
    with calm.asking():
        calm.read()
    moments = sorted(chance.sample(range(20, int(0.97 * calm.num_ids)), NUM_KILLS))
    restarts = core_of(mortal_server, folder).restarts
    with shaken.asking():
        for kills, moment in enumerate(moments):
            shaken.read(until_ids=moment)
            assert wait_for(lambda: core_of(mortal_server, folder).core_pid > 0)
            os.kill(core_of(mortal_server, folder).core_pid, signal.SIGKILL)
            assert wait_for(lambda least=restarts + kills: core_of(mortal_server, folder).restarts > least)
        shaken.read()
    assert core_of(mortal_server, folder).restarts == restarts + NUM_KILLS
    assert wait_for(lambda: counted(mortal_server, "pageflight_engine_restarts_total") == restarts + NUM_KILLS)
    assert wait_for(lambda: counted(mortal_server, "pageflight_engine_ready") == 1)
    assert wait_for(lambda: counted(mortal_server, "pageflight_replayed_sequences_total") > NUM_KILLS)
    assert wait_for(lambda: counted(mortal_server, "pageflight_recomputed_tokens_total") > NUM_KILLS)
    assert counted(mortal_server, "pageflight_poison_requests_total") == 0
    for before, after in zip(calm.answers, shaken.answers, strict=True):
        assert after == before
        assert after.num_final == 1
        for (
            index,
            expected,
        ) in before.log_probs.items():  # of an answer computed as a prompt, whose sums round otherwise
            assert after.log_probs[index] == pytest.approx(expected, abs=1e-4)
    reasons = [reason for answer in shaken.answers for reason in answer.reasons.values()]
    assert set(reasons) == {"length", "stop"} and min(map(reasons.count, set(reasons))) > 4, "no stop word was met"
    assert sum(len(answer.ids) for answer in shaken.answers) == NUM_STREAMS + NUM_STREAMS // 8
    assert sum(any(answer.log_probs.values()) for answer in shaken.answers) == -(-NUM_STREAMS // 3)
