"""What can never work: a typed error with option, value and limit, and the server goes on serving the others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import requests
import tritonclient.grpc as triton
from grpc_stream import stream, tensor, text_tensor
from servers import Server, running_server

from pageflight.cli.errors import ServerStartError

PROMPT = "the quick brown fox"
LONG = "XY" * 600  # capitals are no part of any merged token: one token each

BAD = [
    ({"text_input": ""}, "text_input=''"),
    ({"max_tokens": 5}, "text_input=None: is required"),
    ({"text_input": LONG}, "at most 511"),
    ({"text_input": PROMPT, "max_tokens": 1000}, "max_tokens=1000: at most"),
    ({"text_input": PROMPT, "max_tokens": 0}, "max_tokens=0"),
    ({"text_input": PROMPT, "max_tokens": -5}, "max_tokens=-5"),
    ({"text_input": PROMPT, "min_tokens": 9, "max_tokens": 4}, "min_tokens=9"),
    ({"text_input": PROMPT, "top_k": -7}, "top_k=-7"),
    ({"text_input": PROMPT, "top_p": 1.5}, "top_p=1.5"),
    ({"text_input": PROMPT, "min_p": -0.1}, "min_p"),
    ({"text_input": PROMPT, "temperature": -1.0}, "temperature=-1"),
    ({"text_input": PROMPT, "temperature": 1e30}, "temperature"),
    ({"text_input": PROMPT, "repetition_penalty": 0.0}, "repetition_penalty"),
    ({"text_input": PROMPT, "num_return_sequences": 0}, "num_return_sequences=0"),
    ({"text_input": PROMPT, "num_return_sequences": 100000}, "num_return_sequences=100000"),
    ({"text_input": PROMPT, "timeout_ms": -1}, "timeout_ms=-1"),
    ({"text_input": PROMPT, "stop_words": ["x"] * 10000}, "stop_words='10000 entries'"),
    ({"text_input": PROMPT, "bad_words": ["x" * 5000]}, "bad_words"),
    ({"text_input": PROMPT, "no_such_option": 3}, "no_such_option=3"),
    ({"text_input": PROMPT, "beam_width": 4}, "beam_width=4: beam search"),
    ({"text_input": PROMPT, "length_penalty": 0.5}, "length_penalty=0.5"),
    ({"text_input": PROMPT, "return_context_logits": True}, "return_context_logits=True"),
    ({"text_input": PROMPT, "return_generation_logits": True}, "return_generation_logits=True"),
    ({"text_input": PROMPT, "guided_decoding_guide_type": "json"}, "guided decoding"),
    ({"text_input": PROMPT, "guided_decoding_guide": "{}"}, "guided decoding"),
    ({"text_input": PROMPT, "lora_task_id": 1}, "lora_task_id=1"),
    ({"text_input": PROMPT, "lora_name": "a"}, "lora_name='a'"),
    ({"text_input": PROMPT, "ignore_eos": True, "end_id": 3}, "ignore_eos"),
    ({"text_input": PROMPT, "end_id": 100000}, "end_id=100000"),
    ({"text_input": LONG[:600]}, "text_input='600 tokens'"),
    ({"text_input": PROMPT, "sampling_parameters": '{"temperature": 1' + "0" * 400 + "}"}, "temperature=1000"),
    ({"text_input": PROMPT, "sampling_parameters": "[" * 100_000}, "sampling_parameters="),
    ({"text_input": PROMPT, "embedding_bias_words": ["a"]}, "embedding_bias_weights"),
    ({"text_input": PROMPT, "sampling_parameters": "{not json"}, "sampling_parameters"),
    ({"text_input": PROMPT, "sampling_parameters": '{"temperature": "hot"}'}, "temperature='hot'"),
    ({"text_input": PROMPT, "sampling_parameters": '{"best_of": 3}'}, "best_of=3"),
    ({"text_input": PROMPT, "sampling_parameters": '{"seed": 1.5}'}, "seed=1.5"),
    ({"text_input": PROMPT, "sampling_parameters": '{"max_tokens": 4}', "max_tokens": 5}, "was also given"),
]


@pytest.mark.parametrize(("body", "said"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_option_is_refused_by_name(server: Server, body: dict[str, object], said: str) -> None:
    answer = server.generate(**body)
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["error"]
    assert "Traceback" not in answer.text


@pytest.mark.parametrize("model", ["tiny", "ensemble"])
def test_streamed_request_gets_the_same_error(server: Server, model: str) -> None:
    body = {"text_input": PROMPT, "top_p": 1.5, "stream": True}
    response = requests.post(server.url(model, "generate_stream"), json=body, timeout=20)
    assert "top_p=1.5" in response.text


def test_error_has_tritons_code_for_bad_input(server: Server) -> None:
    streamed = stream(server.grpc, server.name, [text_tensor(PROMPT), tensor("top_p", [7.0], "FP32")])
    assert "top_p=7.0" in str(streamed.errors[0])
    client = triton.InferenceServerClient(server.grpc)
    with pytest.raises(Exception, match=r"top_p=7\.0") as caught:
        client.infer(f"{server.name}_unary", [text_tensor(PROMPT), tensor("top_p", [7.0], "FP32")])
    assert "INVALID_ARGUMENT" in str(caught.value.status())


def test_not_a_number_is_refused(server: Server) -> None:
    """NaN passed every comparison with a limit and reached the sampler."""
    for value in (float("nan"), float("inf")):
        streamed = stream(server.grpc, server.name, [text_tensor(PROMPT), tensor("temperature", [value], "FP32")])
        assert "temperature=" in str(streamed.errors[0])


def test_invalid_utf8_is_refused(server: Server) -> None:
    streamed = stream(server.grpc, server.name, [tensor("text_input", [b"fox \xff\xfe"], "BYTES")])
    assert "text_input" in str(streamed.errors[0])
    assert "UTF-8" in str(streamed.errors[0])
    raw = requests.post(server.url(server.name, "generate"), data=b'{"text_input": "\xff\xfe"}', timeout=20)
    assert raw.status_code == 400
    assert "UTF-8" in raw.text


def test_wrong_types_and_shapes_are_refused(server: Server) -> None:
    """Triton itself refuses these; the model behind must not notice."""
    wrong = [
        [text_tensor(PROMPT), tensor("max_tokens", [1.0], "FP32")],
        [text_tensor(PROMPT), tensor("max_tokens", [1, 2], "INT32")],
        [text_tensor(PROMPT, batched=True)],
        [tensor("text_input", [1], "INT32")],
        [text_tensor(PROMPT), tensor("no_such_tensor", [1], "INT32")],
    ]
    for inputs in wrong:
        assert stream(server.grpc, server.name, inputs).errors


def test_ten_megabyte_prompt_is_refused_quickly(server: Server) -> None:
    """The whole text was tokenized before its length was looked at, which kept every other request waiting."""
    streamed = stream(server.grpc, server.name, [tensor("text_input", [b"fox jumps " * 1_000_000], "BYTES")])
    assert "10000000 characters" in str(streamed.errors[0])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"text_input": ""}, "text_input (QUERY)=''"),
        ({"text_input": PROMPT, "end_id": 2_000_000_000}, "end_id=2000000000"),
        ({"text_input": PROMPT, "max_tokens": 1000}, " max_tokens=1000: at most"),
        ({"text_input": PROMPT, "top_k": -7}, " top_k=-7"),
        ({"text_input": PROMPT, "num_return_sequences": 64, "temperature": 1.0}, "num_return_sequences=64"),
    ],
)
def test_ensemble_names_options_as_its_client_does(slow_server: Server, body: dict[str, object], said: str) -> None:
    answer = slow_server.generate("ensemble", **body)
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["error"]


def test_stop_without_an_id_is_refused(server: Server) -> None:
    """It cancelled every open request without an id."""
    errors = stream(server.grpc, "engine", [tensor("stop", [True], "BOOL", batched=True)]).errors
    assert "needs the id of the request to cancel" in str(errors[0])


def test_engine_refuses_ids_outside_the_vocabulary(server: Server) -> None:
    for ids in ([5, server.vocab_size], [-1]):
        inputs = [tensor("input_ids", ids, "INT32", batched=True)]
        assert "token ids must be" in str(stream(server.grpc, "engine", inputs).errors[0])


def test_engine_refuses_a_broken_word_list(server: Server) -> None:
    words = triton.InferInput("stop_words_list", [1, 2, 2], "INT32")
    words.set_data_from_numpy(np.array([[[5, 6], [9, -1]]], dtype=np.int32))
    inputs = [tensor("input_ids", [5, 6], "INT32", batched=True), words]
    assert "stop_words_list=9" in str(stream(server.grpc, "engine", inputs).errors[0])


def test_prompt_error_in_the_ensemble_names_its_step(server: Server) -> None:
    answer = server.generate("ensemble", text_input=LONG)
    assert answer.status_code == 400
    assert "511" in answer.text


def test_server_still_serves_after_all_that(server: Server) -> None:
    assert server.text(text_input=PROMPT, max_tokens=4)
    assert server.generate("ensemble", text_input=PROMPT, max_tokens=4).status_code == 200


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["fingerprint"].update(dict.fromkeys(m["fingerprint"], "another")), "ManifestMismatch"),
        (lambda m: m.update(format_version=99), "format_version=99"),
    ],
    ids=["built for another machine", "another format"],
)
def test_repository_of_another_machine_is_refused_with_the_reason(
    repository: tuple[Path, int], tmp_path: Path, change: object, said: str
) -> None:
    assert callable(change)
    copy = tmp_path / "repository"
    shutil.copytree(repository[0], copy)
    path = copy / "engine" / "1" / "artifacts" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ServerStartError, match=said), running_server(copy, "tiny", 0):
        pass


def test_truncated_weights_are_refused_with_the_reason(repository: tuple[Path, int], tmp_path: Path) -> None:
    copy = tmp_path / "repository"
    shutil.copytree(repository[0], copy)
    weights = copy / "engine" / "1" / "artifacts" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ServerStartError, match=r"model\.safetensors"), running_server(copy, "tiny", 0):
        pass
