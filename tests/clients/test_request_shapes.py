"""Requests as programs that nobody here wrote send them."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
import requests
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from grpc_stream import stream, tensor, text_tensor
from servers import Server

from pageflight.text.tokenizer import Tokenizer

PROMPT = "the quick brown fox"
IDS = [50, 60, 70, 80, 90]


def expected(server: Server, max_tokens: int) -> str:
    return server.text(text_input=PROMPT, max_tokens=max_tokens)


@pytest.mark.parametrize("shape", [[1, 1]])
def test_genai_perf_tensorrtllm(server: Server, shape: list[int]) -> None:
    """genai-perf --backend tensorrtllm: text_input, max_tokens, stream and min_length, each [1, 1] on the wire."""
    inputs = [text_tensor(PROMPT, batched=True)]
    inputs += [tensor("max_tokens", [8], "INT32", batched=True), tensor("min_length", [8], "INT32", batched=True)]
    inputs += [tensor("stream", [True], "BOOL", batched=True)]
    streamed = stream(server.grpc, "ensemble", inputs)
    assert streamed.joined() == expected(server, 8)


def test_genai_perf_tensorrtllm_engine(server: Server) -> None:
    """genai-perf's tensorrtllm_engine: token ids to the engine model."""
    inputs = [
        tensor("input_ids", IDS, "INT32", batched=True),
        tensor("input_lengths", [len(IDS)], "INT32", batched=True),
        tensor("request_output_len", [6], "INT32", batched=True),
        tensor("min_length", [6], "INT32", batched=True),
        tensor("streaming", [True], "BOOL", batched=True),
    ]
    streamed = stream(server.grpc, "engine", inputs)
    lengths = [int(result.as_numpy("sequence_length").ravel()[0]) for result in streamed.results]
    ids = [result.as_numpy("output_ids").ravel()[:n] for result, n in zip(streamed.results, lengths, strict=True)]
    assert sum(len(each) for each in ids) == 6
    assert streamed.num_final == 1


def test_genai_perf_triton_generate(server: Server) -> None:
    """genai-perf's triton_generate and curl users: a `model` entry and flat options in the JSON body."""
    body = {"model": server.name, "text_input": PROMPT, "max_tokens": 6, "stream": True, "temperature": 0}
    response = requests.post(server.url(server.name, "generate_stream"), json=body, timeout=30)
    texts = [json.loads(line[5:])["text_output"] for line in response.text.splitlines() if line.startswith("data:")]
    assert "".join(texts) == expected(server, 6)


def test_aiperf_template_endpoint(server: Server) -> None:
    """aiperf's template endpoint posts whatever its template makes; it reads `text_output` of each event."""
    body = {
        "text_input": PROMPT,
        "max_tokens": 60,
        "stream": True,
        "parameters": {"min_tokens": 60, "ignore_eos": True},
    }
    response = requests.post(server.url(server.name, "generate_stream"), json=body, stream=True, timeout=30)
    events = [json.loads(line[5:]) for line in response.iter_lines() if line.startswith(b"data:")]
    assert all("text_output" in event for event in events)
    assert len(events) > 1


def test_aiperf_kserve_v2(server: Server) -> None:
    """text_input BYTES [1] and max_tokens INT32 [1] as tensors, everything else as request parameters."""
    parameters = {"temperature": "0.0", "top_p": "1.0", "min_tokens": 6, "ignore_eos": True}
    inputs = [text_tensor(PROMPT), tensor("max_tokens", [6], "INT32")]
    client = triton.InferenceServerClient(server.grpc)
    unary = client.infer(f"{server.name}_unary", inputs, parameters=parameters)
    streamed = stream(server.grpc, server.name, inputs, parameters={**parameters, "stream": True})
    assert unary.as_numpy("text_output")[0].decode() == streamed.joined() == expected(server, 6)


def test_aiperf_kserve_v2_over_http(server: Server) -> None:
    body = {
        "inputs": [
            {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": [PROMPT]},
            {"name": "max_tokens", "datatype": "INT32", "shape": [1], "data": [6]},
        ],
        "parameters": {"temperature": 0.0, "min_tokens": 6},
    }
    response = requests.post(server.url(f"{server.name}_unary", "infer"), json=body, timeout=30)
    assert response.status_code == 200, response.text
    outputs = {output["name"]: output["data"] for output in response.json()["outputs"]}
    assert outputs["text_output"] == [expected(server, 6)]


def test_vllm_backend_client(server: Server) -> None:
    """Its sample client: aio stream, numbers as strings, the same options as JSON tensor and as parameters."""
    sampling = {"temperature": "0", "top_p": "0.95", "max_tokens": "7"}
    inputs = [
        text_tensor(PROMPT),
        tensor("stream", [False], "BOOL"),
        tensor("sampling_parameters", [json.dumps(sampling).encode()], "BYTES"),
    ]

    async def ask() -> list[str]:
        client = triton_aio.InferenceServerClient(server.grpc)

        async def requests_to_send():  # type: ignore[no-untyped-def]
            yield {
                "model_name": server.name,
                "inputs": inputs,
                "outputs": [triton_aio.InferRequestedOutput("text_output")],
                "request_id": "0",
                "parameters": sampling,
            }

        texts = []
        async for result, error in client.stream_infer(requests_to_send()):
            assert error is None, error
            assert result.get_response().id == "0"
            texts += [text.decode() for text in result.as_numpy("text_output")]
        await client.close()
        return texts

    assert asyncio.run(ask()) == [expected(server, 7)]


@pytest.mark.parametrize("model", ["ensemble", "tiny", "tiny_unary"])
def test_tensorrt_llm_documented_curl(server: Server, model: str) -> None:
    """Its empty strings, which mean no words, were refused."""
    body = '{"text_input":"What is machine learning?","max_tokens":4,"bad_words":"","stop_words":""}'
    response = requests.post(server.url(model, "generate"), data=body, timeout=30)
    assert response.status_code == 200, response.text
    assert response.json()["text_output"] == server.text(text_input="What is machine learning?", max_tokens=4)


def test_generate_on_the_ensemble_says_why_the_answer_ended(server: Server) -> None:
    answer = server.generate("ensemble", text_input=PROMPT, max_tokens=6).json()
    assert answer["text_output"] == expected(server, 6)
    assert (answer["finish_reason"], answer["num_output_tokens"]) == ("length", 6)
    body = {"text_input": PROMPT, "max_tokens": 6, "stream": True}
    response = requests.post(server.url("ensemble", "generate_stream"), json=body, timeout=30)
    events = [json.loads(line[5:]) for line in response.text.splitlines() if line.startswith("data:")]
    assert "".join(event["text_output"] for event in events) == expected(server, 6)
    assert ["finish_reason" in event for event in events] == [False] * (len(events) - 1) + [True]


def test_empty_words_are_no_words_on_engine_and_preprocessing(server: Server) -> None:
    empty = [b""]
    inputs = [
        tensor("input_ids", IDS, "INT32", batched=True),
        tensor("request_output_len", [3], "INT32", batched=True),
        tensor("stop_words", empty, "BYTES", batched=True),
        tensor("embedding_bias_words", empty, "BYTES", batched=True),
        tensor("embedding_bias_weights", [1.0], "FP32", batched=True),
    ]
    assert not stream(server.grpc, "engine", inputs).errors
    query = tensor("QUERY", [PROMPT.encode()], "BYTES", batched=True)
    words = [tensor(name, empty, "BYTES", batched=True) for name in ("STOP_WORDS_DICT", "BAD_WORDS_DICT")]
    made = triton.InferenceServerClient(server.grpc).infer("preprocessing", [query, *words])
    assert (made.as_numpy("STOP_WORDS_IDS")[0, 1] == -1).all()


def test_vllm_sampling_parameters_with_lists(server: Server) -> None:
    full = expected(server, 20)
    sampling = {"stop": [full[4:7]], "max_tokens": 20, "ignore_eos": False, "n": 1, "logit_bias": None}
    assert server.text(text_input=PROMPT, sampling_parameters=json.dumps(sampling)) == full[: full.index(full[4:7])]


def test_tensorrt_llm_client_with_stop_words_list(server: Server, repository: tuple[object, int]) -> None:
    """inflight_batcher_llm's client: preprocessing's word list, the engine's ids, postprocessing's text."""
    client = triton.InferenceServerClient(server.grpc)
    query = tensor("QUERY", [PROMPT.encode()], "BYTES", batched=True)
    length = tensor("REQUEST_OUTPUT_LEN", [20], "INT32", batched=True)
    full = expected(server, 20)
    words = tensor("STOP_WORDS_DICT", [full[3:5].encode()], "BYTES", batched=True)
    first = client.infer("preprocessing", [query, length, words])
    names = {"INPUT_ID": "input_ids", "REQUEST_INPUT_LEN": "input_lengths", "STOP_WORDS_IDS": "stop_words_list"}
    inputs = []
    for name, spelling in {**names, "REQUEST_OUTPUT_LEN": "request_output_len"}.items():
        array = first.as_numpy(name)
        made = triton.InferInput(spelling, list(array.shape), "INT32")
        made.set_data_from_numpy(array)
        inputs.append(made)
    streamed = stream(server.grpc, "engine", inputs)
    (answer,) = streamed.results
    tokens = triton.InferInput("TOKENS_BATCH", list(answer.as_numpy("output_ids").shape), "INT32")
    tokens.set_data_from_numpy(answer.as_numpy("output_ids"))
    lengths = triton.InferInput("SEQUENCE_LENGTH", list(answer.as_numpy("sequence_length").shape), "INT32")
    lengths.set_data_from_numpy(answer.as_numpy("sequence_length"))
    text = client.infer("postprocessing", [tokens, lengths]).as_numpy("OUTPUT").ravel()[0].decode()
    tokenizer = Tokenizer.load(repository[0] / "engine" / "1" / "artifacts" / "tokenizer")  # type: ignore[operator]
    ids = answer.as_numpy("output_ids").ravel()[: int(answer.as_numpy("sequence_length").ravel()[0])]
    assert text == tokenizer.decode(ids.tolist())
    assert full.startswith(answer.as_numpy("text_output").ravel()[0].decode())


def test_engine_answer_can_start_with_the_prompt(server: Server) -> None:
    inputs = [
        tensor("input_ids", IDS, "INT32", batched=True),
        tensor("request_output_len", [3], "INT32", batched=True),
        tensor("exclude_input_in_output", [False], "BOOL", batched=True),
    ]
    (answer,) = stream(server.grpc, "engine", inputs).results
    assert answer.as_numpy("output_ids").ravel()[: len(IDS)].tolist() == IDS
    assert int(np.ravel(answer.as_numpy("sequence_length"))[0]) == len(IDS) + 3
