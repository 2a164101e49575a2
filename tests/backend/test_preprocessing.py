from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from triton_python_backend_utils import Tensor

from pageflight.backend.generations import GenerationBuilder
from pageflight.backend.inputs import word_list
from pageflight.backend.preprocessing import TritonPythonModel


class NoLedger:
    """Of a stub without a server."""

    def counting(self, num_requests: int) -> AbstractContextManager[None]:
        return nullcontext()


def ask(builder: GenerationBuilder, **tensors: Any) -> Any:
    model = TritonPythonModel()
    model._builder, model._ledger = builder, NoLedger()  # type: ignore[assignment]
    arrays = {name: np.array(value) for name, value in {"QUERY": [[b"the fox"]], **tensors}.items()}
    request = SimpleNamespace(
        inputs=lambda: [Tensor(name, array) for name, array in arrays.items()],
        parameters=lambda: "",
        request_id=lambda: "",
    )
    (response,) = model.execute([request])
    return response


def outputs(response: Any) -> dict[str, np.ndarray]:
    assert response.error is None, response.error
    return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors}


def test_bad_words_are_banned_after_a_space_too(builder: GenerationBuilder) -> None:
    """By way of `preprocessing` "fox" was banned at the beginning of a text only; `ensemble` banned both."""
    made = outputs(ask(builder, BAD_WORDS_DICT=[[b"fox"]]))
    words = word_list("bad_words_list", made["BAD_WORDS_IDS"][0])
    assert words == (builder.encode_word("fox"), builder.encode_word(" fox"))
    assert len(set(words)) == 2


@pytest.mark.parametrize("num_rows", [1, 2])
def test_empty_words_are_no_words(builder: GenerationBuilder, num_rows: int) -> None:
    rows = [[b""]] * num_rows
    made = outputs(ask(builder, QUERY=[[b"the fox"]] * num_rows, BAD_WORDS_DICT=rows, STOP_WORDS_DICT=rows))
    for name in ("BAD_WORDS_IDS", "STOP_WORDS_IDS"):
        assert made[name].shape[0] == num_rows
        assert [word_list("words", array) for array in made[name]] == [()] * num_rows


def test_empty_bias_word_goes_with_its_weight(builder: GenerationBuilder) -> None:
    weights = np.array([[2.0, 3.0]], dtype=np.float32)
    made = outputs(ask(builder, EMBEDDING_BIAS_WORDS=[[b"", b"x"]], EMBEDDING_BIAS_WEIGHTS=weights))
    (index,) = builder.encode_word("x")
    assert np.flatnonzero(made["EMBEDDING_BIAS"][0]).tolist() == [index]
    assert made["EMBEDDING_BIAS"][0, index] == 3.0


def test_error_of_the_prompt_has_the_name_that_clients_of_the_ensemble_know(builder: GenerationBuilder) -> None:
    assert "text_input (QUERY)=''" in ask(builder, QUERY=[[b""]]).error.message
