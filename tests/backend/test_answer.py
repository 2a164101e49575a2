from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from pageflight.backend.answer import Answer, AnswerForm, Reply
from pageflight.backend.cancellation import CancellationWatch
from pageflight.backend.options import Options
from pageflight.core import wire
from pageflight.core.errors import Cancelled, InvalidArgument
from pageflight.core.events import TokenEvent, Usage

OUTPUTS = frozenset(tensor.name for tensor in wire.ENGINE_OUTPUTS)
TEXT_OUTPUTS = frozenset(tensor.name for tensor in wire.TEXT_OUTPUTS)
"""All that an ensemble maps; it has no use for ids."""
USAGE = Usage(num_input_tokens=3, num_output_tokens=2, cum_log_prob=-1.5)


class Sender:
    """Triton's response sender: nothing may follow the final flag, not even a question."""

    def __init__(self) -> None:
        self.sent: list[tuple[object, int]] = []
        self.cancelled = False

    def send(self, response: object = None, flags: int = 0) -> None:
        assert not self.is_over, "sent after the final response"
        self.sent.append((response, flags))

    @property
    def is_over(self) -> bool:
        return any(flags for _, flags in self.sent)

    def is_cancelled(self) -> bool:
        assert not self.is_over, "asked after the final response"
        return self.cancelled

    def tensors(self, index: int) -> dict[str, np.ndarray]:
        return {tensor.name(): tensor.as_numpy() for tensor in self.sent[index][0].output_tensors}  # type: ignore[attr-defined]


def make(
    *, stream: bool, num_sequences: int = 1, wanted: frozenset[str] = frozenset(), prefix: str = ""
) -> tuple[Sender, Reply, Answer]:
    sender = Sender()
    reply = Reply(sender)
    answer = Answer(
        reply=reply,
        form=AnswerForm(outputs=OUTPUTS, is_batched=False),
        wanted=wanted,
        num_sequences=num_sequences,
        batch_index=None,
        stream=stream,
        prefix=prefix,
    )
    return sender, reply, answer


def event(index: int = 0, text: str = "", *, final: bool = False, ids: tuple[int, ...] = (1,)) -> TokenEvent:
    return TokenEvent(
        sequence_index=index,
        text=text,
        ids=ids,
        final=final,
        finish_reason="stop" if final else None,
        usage=USAGE if final else None,
    )


def test_final_flag_comes_with_the_last_response_once() -> None:
    sender, reply, answer = make(stream=True)
    answer.take(event(text="a"))
    answer.take(event(text="b", final=True))
    assert [flags for _, flags in sender.sent] == [0, 1]
    assert reply.is_over


def test_first_token_is_told_even_without_text() -> None:
    """The first bytes of a character made no text, and the time to the first token was that of the second."""
    sender, _, answer = make(stream=True)
    for _ in range(3):
        answer.take(event())
    assert len(sender.sent) == 1


def test_every_token_is_told_where_ids_are_wanted() -> None:
    sender, _, answer = make(stream=True, wanted=frozenset(("output_ids", "sequence_length")))
    for _ in range(3):
        answer.take(event())
    assert len(sender.sent) == 3
    assert sender.tensors(2)["output_ids"].tolist() == [[1]]


def test_last_sequence_of_several_ends_the_request() -> None:
    sender, _, answer = make(stream=True, num_sequences=2)
    answer.take(event(1, "x", final=True))
    answer.take(event(0, "y"))
    answer.take(event(0, "z", final=True))
    assert [flags for _, flags in sender.sent] == [0, 0, 1]
    assert [int(sender.tensors(i)["sequence_index"][0]) for i in range(3)] == [1, 0, 0]


def test_answer_that_is_not_streamed_collects_its_sequences_in_order() -> None:
    sender, _, answer = make(stream=False, num_sequences=2, wanted=frozenset(("finish_reason",)), prefix="> ")
    answer.take(event(1, "two", final=True))
    answer.take(event(0, "one", final=True))
    assert sender.tensors(0)["text_output"].tolist() == [b"> one", b"> two"]
    assert sender.tensors(0)["finish_reason"].tolist() == [b"stop", b"stop"]
    assert len(sender.sent) == 1


def test_rows_of_different_length_are_padded() -> None:
    sender, _, answer = make(stream=False, num_sequences=2, wanted=frozenset(("output_ids", "sequence_length")))
    answer.pad_id = 9
    answer.take(event(0, "a", final=True, ids=(1, 2, 3)))
    answer.take(event(1, "b", final=True, ids=(4,)))
    assert sender.tensors(0)["output_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert sender.tensors(0)["sequence_length"].tolist() == [3, 1]


def test_error_of_one_sequence_is_the_streams_error() -> None:
    sender, _, answer = make(stream=True)
    answer.take(TokenEvent(sequence_index=0, final=True, error=Cancelled("gone"), usage=USAGE, finish_reason="x"))
    response, flags = sender.sent[0]
    assert (response.error.code, response.error.message, flags) == ("CANCELLED", "gone", 1)  # type: ignore[attr-defined]


@pytest.mark.parametrize("failing", [(0, 1, 2), (1,), (2,)])
def test_a_request_has_one_error_however_many_of_its_sequences_failed(failing: tuple[int, ...]) -> None:
    """A stream of 12 sequences that met a full queue got 12 errors; its client took 11 of them for other requests'."""
    sender, reply, answer = make(stream=True, num_sequences=3)
    for index in range(3):
        error = Cancelled(f"gone {index}") if index in failing else None
        final = event(index, str(index), final=True)
        answer.take(replace(final, error=error, finish_reason="cancelled") if error else final)
    *texts, (last, flags) = sender.sent
    assert (last.error.message, flags, reply.is_over) == (f"gone {failing[0]}", 1, True)  # type: ignore[attr-defined]
    assert [sender.tensors(index)["text_output"].tolist() for index in range(len(texts))] == [
        [str(index).encode()] for index in range(3) if index not in failing
    ]


def test_nothing_is_sent_after_a_failure() -> None:
    """Tokens of the other rows of a batch arrived after the request had failed, and Triton raised."""
    sender, reply, answer = make(stream=True)
    reply.expect(2)
    reply.fail(InvalidArgument("top_p", 7, "must be less"))
    answer.take(event(text="late"))
    answer.take(event(text="later", final=True))
    reply.fail(InvalidArgument("top_p", 7, "must be less"))
    assert len(sender.sent) == 1


def test_asking_for_everything_is_no_wish() -> None:
    for outputs in (OUTPUTS, TEXT_OUTPUTS):
        form = AnswerForm(outputs=outputs, is_batched=False)
        assert form.wanted(Options(), outputs) <= {"output_ids", "sequence_length"}
        assert not form.is_from_ensemble(outputs)


def test_ensembles_last_response_alone_has_what_its_client_may_have_named() -> None:
    """Outputs that a client of `ensemble` named never reached the engine and were left out without a word."""
    form = AnswerForm(outputs=OUTPUTS, is_batched=True)
    wanted = form.wanted(Options(), TEXT_OUTPUTS)
    assert wanted == {"finish_reason", "num_input_tokens", "num_output_tokens"}
    sender, _, answer = make(stream=True, wanted=wanted)
    answer.take(event(text="a"))
    answer.take(event(text="b", final=True))
    assert set(sender.tensors(0)) == {"text_output"}
    assert set(sender.tensors(1)) == {"text_output", *wanted}


def test_log_probs_reach_an_ensemble_only_when_asked_for() -> None:
    options = Options()
    options.add("return_log_probs", True)
    assert "cum_log_probs" in AnswerForm(outputs=OUTPUTS, is_batched=True).wanted(options, TEXT_OUTPUTS)


def test_outputs_are_sent_when_named_or_asked_for_by_option() -> None:
    form = AnswerForm(outputs=OUTPUTS, is_batched=False)
    assert form.wanted(Options(), frozenset(("text_output", "finish_reason"))) == {"finish_reason"}
    options = Options()
    options.add("return_num_output_tokens", True)
    assert "num_output_tokens" in form.wanted(options, OUTPUTS)


def test_watch_cancels_a_request_whose_client_has_gone() -> None:
    sender, reply, _ = make(stream=True)
    watch = CancellationWatch()
    called = threading.Event()
    watch.add(reply, "id", called.set)
    assert not called.wait(0.1)
    sender.cancelled = True
    assert called.wait(5)
    watch.close()


def test_watch_forgets_requests_that_are_over() -> None:
    """It went on asking, and Triton's answer after the final response was a crash."""
    sender, reply, answer = make(stream=True)
    watch = CancellationWatch()
    watch.add(reply, "id", lambda: None)
    answer.take(event(text="x", final=True))
    sender.cancelled = True
    assert not watch.cancel("id")
    for _ in range(100):
        if not watch._open:
            break
        threading.Event().wait(0.02)
    assert not watch._open
    watch.close()


def test_watch_cancels_by_request_id() -> None:
    _, reply, _ = make(stream=True)
    watch = CancellationWatch()
    called = threading.Event()
    watch.add(reply, "one", called.set)
    assert not watch.cancel("another")
    assert watch.cancel("one")
    assert called.is_set()
    watch.close()
