from __future__ import annotations

import json
import shutil
import subprocess

import numpy as np
import pytest
import requests
import tritonclient.http as triton
from servers import Server

PROMPT = "the quick brown fox"


def events(response: requests.Response) -> list[dict[str, object]]:
    lines = [line for line in response.iter_lines() if line.startswith(b"data:")]
    return [json.loads(line[5:]) for line in lines]


def stream(server: Server, model: str, **body: object) -> list[dict[str, object]]:
    return events(requests.post(server.url(model, "generate_stream"), json=body, stream=True, timeout=30))


def test_tritonclient_http_infers_on_the_unary_twin(server: Server) -> None:
    with triton.InferenceServerClient(server.http) as client:
        prompt = triton.InferInput("text_input", [1], "BYTES")
        prompt.set_data_from_numpy(np.array([PROMPT.encode()], dtype=np.object_))
        length = triton.InferInput("max_tokens", [1], "INT32")
        length.set_data_from_numpy(np.array([7], dtype=np.int32))
        result = client.infer(f"{server.name}_unary", [prompt, length])
        assert result.as_numpy("text_output")[0].decode() == server.text(text_input=PROMPT, max_tokens=7)


@pytest.mark.parametrize("model", ["tiny", "ensemble"])
def test_generate_stream_sends_deltas(server: Server, model: str) -> None:
    answers = stream(server, model, text_input=PROMPT, max_tokens=9, stream=True, return_finish_reason=True)
    assert len(answers) > 1
    assert "".join(str(answer["text_output"]) for answer in answers) == server.text(text_input=PROMPT, max_tokens=9)
    assert [answer.get("finish_reason") for answer in answers].count("length") == 1


@pytest.mark.parametrize("model", ["tiny", "tiny_unary", "ensemble"])
def test_generate_answers_once(server: Server, model: str) -> None:
    answer = server.generate(model, text_input=PROMPT, max_tokens=9)
    assert answer.status_code == 200
    assert answer.json()["text_output"] == server.text(text_input=PROMPT, max_tokens=9)


def test_documented_curl_command_streams(server: Server) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("no curl here")
    body = json.dumps({"text_input": PROMPT, "max_tokens": 4, "stream": True})
    done = subprocess.run(
        [curl, "-sN", "-X", "POST", server.url("ensemble", "generate_stream"), "-d", body],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    texts = [json.loads(line[5:])["text_output"] for line in done.stdout.splitlines() if line.startswith("data:")]
    assert "".join(texts) == server.text(text_input=PROMPT, max_tokens=4)


def test_max_tokens_defaults_to_the_build_option(server: Server) -> None:
    answer = server.generate(text_input=PROMPT, return_num_output_tokens=True, ignore_eos=True).json()
    assert answer["num_output_tokens"] == 16


def test_prompt_can_begin_the_answer(server: Server) -> None:
    plain = server.text(text_input=PROMPT, max_tokens=5)
    assert server.text(text_input=PROMPT, max_tokens=5, exclude_input_in_output=False) == PROMPT + plain


def test_stop_word_across_token_borders_ends_the_text_before_it(server: Server) -> None:
    """A stop string that began in one token and ended in the next leaked its first half."""
    full = server.text(text_input=PROMPT, max_tokens=24)
    word = full[5:9]
    answer = server.generate(text_input=PROMPT, max_tokens=24, stop_words=[word], return_finish_reason=True).json()
    assert answer["text_output"] == full[: full.index(word)]
    assert answer["finish_reason"] == "stop"
    streamed = stream(server, "ensemble", text_input=PROMPT, max_tokens=24, stop_words=[word], stream=True)
    assert "".join(str(each["text_output"]) for each in streamed) == full[: full.index(word)]


def test_bad_word_does_not_appear(server: Server) -> None:
    """Only the word as it begins a text was forbidden; after a space it is another token."""
    wanted = {"embedding_bias_words": ["fox", " fox"], "embedding_bias_weights": [1000.0, 1000.0]}
    body = {"text_input": PROMPT, "max_tokens": 8, "ignore_eos": True}
    forbidden = ["fo", "x", "f"]
    assert any(word in server.text(**body, **wanted) for word in forbidden)
    text = server.text(**body, **wanted, bad_words=forbidden)
    assert not any(text.startswith(word) for word in forbidden)


def test_embedding_bias_forces_a_token(server: Server) -> None:
    text = server.text(text_input=PROMPT, max_tokens=3, embedding_bias_words=["z"], embedding_bias_weights=[1000.0])
    assert text == "zzz"


def test_perf_metrics_come_on_request(server: Server) -> None:
    answer = server.generate(text_input=PROMPT, max_tokens=4, return_perf_metrics=True).json()
    times = [answer[f"{name}_time_ns"] for name in ("arrival", "first_scheduled", "first_token", "last_token")]
    assert times == sorted(times)
    assert times[0] > 0
    assert answer["kv_cache_alloc_total_blocks"] >= 1
    assert answer["acceptance_rate"] == 0


def test_second_request_with_a_long_prefix_reuses_its_blocks(server: Server) -> None:
    prompt = "the dog sleeps while a fox runs through the wood " * 12
    body = {"text_input": prompt, "max_tokens": 4, "return_perf_metrics": True, "cache_salt": "one"}
    first, second = (server.generate(**body).json() for _ in range(2))
    other = server.generate(**{**body, "cache_salt": "two"}).json()
    assert first["kv_cache_reused_blocks"] == 0
    assert second["kv_cache_reused_blocks"] > 0
    assert other["kv_cache_reused_blocks"] == 0
    assert first["text_output"] == second["text_output"] == other["text_output"]


def test_deadline_ends_a_request_with_a_typed_error(slow_server: Server) -> None:
    answer = slow_server.generate(text_input=PROMPT, max_tokens=400, timeout_ms=200)
    assert answer.status_code >= 400
    assert "timeout_ms" in answer.json()["error"]
