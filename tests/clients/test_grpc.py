from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_stream import open_stream, stream, tensor, text_tensor
from servers import Server, wait_for
from tritonclient.utils import InferenceServerException

PROMPT = "the quick brown fox"


def options(max_tokens: int = 12, **more: tuple[object, str]) -> list[triton.InferInput]:
    made = [tensor("max_tokens", [max_tokens], "INT32"), tensor("stream", [True], "BOOL")]
    return made + [tensor(name, [value], dtype) for name, (value, dtype) in more.items()]


def test_streamed_deltas_join_to_the_unary_answer(server: Server) -> None:
    """Deltas that were decoded one by one lost spaces between words and cut characters in two."""
    streamed = stream(server.grpc, server.name, [text_tensor(PROMPT), *options()])
    assert len(streamed.results) > 1
    assert streamed.joined() == server.text(text_input=PROMPT, max_tokens=12)


def test_exactly_one_response_is_final(server: Server) -> None:
    """A final flag sent apart from the last delta, and again with it, ended streams twice."""
    assert stream(server.grpc, server.name, [text_tensor(PROMPT), *options()]).num_final == 1


def test_ensemble_streams_the_same_text(server: Server) -> None:
    inputs = [text_tensor(PROMPT, batched=True)]
    inputs += [tensor("max_tokens", [12], "INT32", batched=True), tensor("stream", [True], "BOOL", batched=True)]
    streamed = stream(server.grpc, "ensemble", inputs)
    assert len(streamed.results) > 1
    assert streamed.joined() == server.text(text_input=PROMPT, max_tokens=12)
    assert streamed.num_final == 1


def test_unary_twin_answers_a_plain_infer(server: Server) -> None:
    client = triton.InferenceServerClient(server.grpc)
    result = client.infer(f"{server.name}_unary", [text_tensor(PROMPT), tensor("max_tokens", [12], "INT32")])
    assert result.as_numpy("text_output")[0].decode() == server.text(text_input=PROMPT, max_tokens=12)


def test_unary_requests_are_in_flight_together(slow_server: Server) -> None:
    """A model that answers within `execute` would take them one after the other."""
    client = triton.InferenceServerClient(slow_server.grpc)

    def ask(_: int) -> float:
        started = time.monotonic()
        client.infer(f"{slow_server.name}_unary", [text_tensor(PROMPT), tensor("max_tokens", [20], "INT32")])
        return time.monotonic() - started

    alone = ask(0)
    started = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))
    assert time.monotonic() - started < 3 * alone


def test_unary_twin_refuses_to_stream(server: Server) -> None:
    client = triton.InferenceServerClient(server.grpc)
    with pytest.raises(InferenceServerException, match="stream=True") as caught:
        client.infer(f"{server.name}_unary", [text_tensor(PROMPT), *options()])
    assert "INVALID_ARGUMENT" in str(caught.value.status())


def test_many_streams_at_once_each_get_their_own_text(server: Server) -> None:
    """Deltas of one sequence arrived in the stream of another when handles were reused."""
    prompts = [f"the fox number {number} runs" for number in range(16)]
    alone = [server.text(text_input=prompt, max_tokens=24) for prompt in prompts]
    with ThreadPoolExecutor(16) as pool:
        streams = list(pool.map(lambda p: stream(server.grpc, server.name, [text_tensor(p), *options(24)]), prompts))
    assert [each.joined() for each in streams] == alone


def test_seed_decides_the_text_and_nothing_else_does(server: Server) -> None:
    inputs = [text_tensor(PROMPT), *options(24, seed=(7, "UINT64"), temperature=(1.0, "FP32"))]
    texts = {stream(server.grpc, server.name, inputs).joined() for _ in range(3)}
    other = stream(server.grpc, server.name, [text_tensor(PROMPT), *options(24, seed=(8, "UINT64"))])
    assert len(texts) == 1
    assert other.joined() not in texts


def test_several_sequences_come_with_their_index(server: Server) -> None:
    more = options(6, num_return_sequences=(3, "INT32"), temperature=(1.0, "FP32"))
    streamed = stream(server.grpc, server.name, [text_tensor(PROMPT), *more])
    indexes = {int(result.as_numpy("sequence_index")[0]) for result in streamed.results}
    assert indexes == {0, 1, 2}
    assert streamed.num_final == 1


def test_several_sequences_in_one_response(server: Server) -> None:
    body = {"text_input": PROMPT, "max_tokens": 5, "num_return_sequences": 3, "temperature": 1.0, "ignore_eos": True}
    answer = server.generate(**body, return_finish_reason=True, return_num_output_tokens=True).json()
    assert len(answer["text_output"]) == 3
    assert answer["finish_reason"] == ["length"] * 3
    assert answer["num_output_tokens"] == [5] * 3


def test_rows_of_a_batch_become_generations_with_their_index(server: Server) -> None:
    prompts = ["the fox", "a dog sleeps while"]
    texts = np.array([[prompt.encode()] for prompt in prompts], dtype=np.object_)
    query = triton.InferInput("text_input", [2, 1], "BYTES")
    query.set_data_from_numpy(texts)
    lengths = triton.InferInput("max_tokens", [2, 1], "INT32")
    lengths.set_data_from_numpy(np.array([[6], [9]], dtype=np.int32))
    streamed = stream(server.grpc, "ensemble", [query, lengths])
    by_row = {int(r.as_numpy("batch_index").ravel()[0]): r.as_numpy("text_output").ravel() for r in streamed.results}
    expected = [server.text(text_input=p, max_tokens=n) for p, n in zip(prompts, (6, 9), strict=True)]
    assert [by_row[row][0].decode() for row in (0, 1)] == expected
    assert streamed.num_final == 1


def test_outputs_can_be_asked_for_by_name(server: Server) -> None:
    wanted = [triton.InferRequestedOutput(name) for name in ("text_output", "num_output_tokens")]
    streamed = stream(server.grpc, server.name, [text_tensor(PROMPT), *options(5)], outputs=wanted)
    assert int(streamed.last("num_output_tokens")[0]) == 5


def test_outputs_of_the_ensemble_can_be_asked_for_by_name(server: Server) -> None:
    """What the client named did not reach the engine, and `finish_reason` was left out without a word."""
    inputs = [text_tensor(PROMPT, batched=True), tensor("max_tokens", [5], "INT32", batched=True)]
    inputs.append(tensor("stream", [True], "BOOL", batched=True))
    wanted = [triton.InferRequestedOutput(name) for name in ("text_output", "finish_reason", "num_output_tokens")]
    streamed = stream(server.grpc, "ensemble", inputs, outputs=wanted)
    names = [{output.name for output in result.get_response().outputs} for result in streamed.results]
    assert names[-1] == {"text_output", "finish_reason", "num_output_tokens"}
    assert len(names) > 1
    assert all(earlier == {"text_output"} for earlier in names[:-1])
    assert streamed.last("finish_reason").ravel().tolist() == [b"length"]
    assert streamed.last("num_output_tokens").ravel().tolist() == [5]


def test_timeout_argument_of_the_client_is_the_deadline(slow_server: Server) -> None:
    """Microseconds of tritonclient's own argument; it was ignored, and the answer came 10 s later here."""
    for model, batched in ((slow_server.name, False), ("ensemble", True)):
        inputs = [text_tensor(PROMPT, batched=batched), tensor("max_tokens", [480], "INT32", batched=batched)]
        assert "timeout_ms passed" in str(stream(slow_server.grpc, model, inputs, timeout=200_000).errors[0])


def test_log_probs_come_one_per_token(server: Server) -> None:
    more = options(5, return_log_probs=(True, "BOOL"))
    streamed = stream(server.grpc, server.name, [text_tensor(PROMPT), *more])
    pieces = [result.as_numpy("output_log_probs").ravel() for result in streamed.results]
    log_probs = np.concatenate(pieces)
    assert log_probs.shape == (5,)
    assert (log_probs < 0).all()
    assert float(streamed.last("cum_log_probs")[0]) == pytest.approx(float(log_probs.sum()), rel=1e-4)


def used_blocks(server: Server) -> float:
    gauges = server.metrics()
    return sum(value for series, value in gauges.items() if 'kv_cache_block_type="used"' in series)


def cancellations(server: Server) -> float:
    return sum(v for series, v in server.metrics().items() if series.startswith("pageflight_cancellations_total"))


def test_cancelled_stream_frees_its_blocks(slow_server: Server) -> None:
    """A client that left in mid-stream kept its blocks until max_tokens was reached, 10 s later here."""
    before = cancellations(slow_server)
    with open_stream(slow_server.grpc) as (client, answers):
        client.async_stream_infer(slow_server.name, [text_tensor(PROMPT), *options(480)])
        for _ in range(3):
            _, error = answers.get(timeout=10)
            assert error is None
        assert wait_for(lambda: used_blocks(slow_server) > 0)
    assert wait_for(lambda: cancellations(slow_server) == before + 1, 5.0)
    assert wait_for(lambda: used_blocks(slow_server) == 0, 5.0)


def test_closed_http_connection_frees_its_blocks(slow_server: Server) -> None:
    import requests

    before = cancellations(slow_server)
    body = {"text_input": PROMPT, "max_tokens": 480, "stream": True}
    url = slow_server.url(slow_server.name, "generate_stream")
    with requests.post(url, json=body, stream=True, timeout=10) as response:
        assert next(response.iter_lines())
    assert wait_for(lambda: cancellations(slow_server) == before + 1, 8.0)


@pytest.mark.parametrize("attempt", range(4))  # whichever of the two instances gets the one and the other
def test_stop_request_cancels_the_open_one_of_that_id(slow_server: Server, attempt: int) -> None:
    """TensorRT-LLM's clients cancel so, once; each instance knew its own requests and refused those of the other."""
    ids = np.arange(5, 15, dtype=np.int32).reshape(1, -1)
    prompt = triton.InferInput("input_ids", list(ids.shape), "INT32")
    prompt.set_data_from_numpy(ids)
    inputs = [prompt, tensor("request_output_len", [480], "INT32", batched=True)]
    inputs.append(tensor("streaming", [True], "BOOL", batched=True))
    stop = tensor("stop", [True], "BOOL", batched=True)
    with open_stream(slow_server.grpc) as (client, answers), open_stream(slow_server.grpc) as (other, stopped):
        client.async_stream_infer("engine", inputs, request_id=f"request-{attempt}")
        assert answers.get(timeout=10)[1] is None
        other.async_stream_infer("engine", [stop], request_id=f"request-{attempt}", enable_empty_final_response=True)
        assert stopped.get(timeout=10)[1] is None
        errors = []
        while not errors:
            _, error = answers.get(timeout=10)
            errors += [error] if error is not None else []
    assert "cancelled" in str(errors[0])


def test_both_instances_serve(slow_server: Server) -> None:
    with ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(lambda _: slow_server.text(text_input=PROMPT, max_tokens=12), range(6)))
    assert len(set(texts)) == 1
    generated = {s: v for s, v in slow_server.metrics().items() if s.startswith("pageflight_generated_tokens_total")}
    assert len(generated) == 2
    assert wait_for(lambda: all(v > 0 for s, v in slow_server.metrics().items() if s in generated), 5.0), (
        slow_server.metrics()
    )


def test_full_queue_is_unavailable_and_says_so(slow_server: Server) -> None:
    """Two instances of 4 rows and 4 waiting each: of 32 requests at once some must be refused, and typed."""

    def ask(_: int) -> tuple[int, str]:
        answer = slow_server.generate(text_input=PROMPT, max_tokens=40)
        return answer.status_code, answer.text

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, range(32)))
    refused = [text for status, text in answers if status != 200]
    assert refused
    assert len(refused) < 32
    assert all("queue is full" in text and "limit 4" in text for text in refused)
