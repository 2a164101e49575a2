from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from triton_python_backend_utils import Tensor

from pageflight.backend.answer import AnswerForm
from pageflight.backend.front_model import FrontModel
from pageflight.backend.generations import GenerationBuilder, TokenWishes
from pageflight.backend.inputs import Row
from pageflight.core import wire
from pageflight.core.errors import InvalidArgument, PageflightError, PromptTooLong, Unsupported
from pageflight.loop.open_sequence import Generation

ENGINE_OUTPUTS = frozenset(tensor.name for tensor in wire.ENGINE_OUTPUTS)
TEXT_OUTPUTS = frozenset(tensor.name for tensor in wire.TEXT_OUTPUTS)


class Front:
    """Takes generations, or refuses them with an error as the core's limits do."""

    def __init__(self, error: PageflightError | None = None) -> None:
        self.error = error
        self.taken: list[Generation] = []

    def submit(self, generation: Generation, sink: object, session: str) -> int:
        if self.error is not None:
            raise self.error
        self.taken.append(generation)
        return 0


class Sender:
    def __init__(self) -> None:
        self.errors: list[str] = []

    def send(self, response: Any = None, flags: int = 0) -> None:
        self.errors.append(f"{response.error.code} {response.error.message}")

    def is_cancelled(self) -> bool:
        return False


class Model(FrontModel):
    def __init__(self, builder: GenerationBuilder, name: str, error: PageflightError | None = None) -> None:
        is_engine = name == "engine"
        self.settings = SimpleNamespace(name=name, is_batched=True)  # type: ignore[assignment]
        self._tensors = wire.ENGINE_INPUTS if is_engine else wire.TEXT_INPUTS
        self._may_stream = self._was_ready = True
        self._form = AnswerForm(outputs=ENGINE_OUTPUTS if is_engine else TEXT_OUTPUTS, is_batched=True)
        self.builder = builder
        self.front = Front(error)  # type: ignore[assignment]
        self.watch = SimpleNamespace(add=lambda *_: None)  # type: ignore[assignment]

    def prompt_of(self, row: Row) -> Any:
        return (1, 2), TokenWishes(), lambda: "text"


def ask(
    model: Model, tensors: dict[str, Any], *, outputs: frozenset[str] | None = None, timeout_us: int = 0, more: str = ""
) -> str:
    """The error that comes back, empty for none."""
    sender = Sender()
    request = SimpleNamespace(
        inputs=lambda: [Tensor(name, np.array([[value]])) for name, value in {"prompt": 0, **tensors}.items()],
        parameters=lambda: more,
        request_id=lambda: "r",
        timeout=lambda: timeout_us,
        requested_output_names=lambda: outputs if outputs is not None else model._form.outputs,
        get_response_sender=lambda: sender,
    )
    model.serve(request)
    return "".join(sender.errors)


@pytest.mark.parametrize(
    ("name", "outputs", "tensors", "error", "said"),
    [
        ("m", None, {"end_id": 2_000_000_000}, None, "INVALID_ARG end_id=2000000000: token ids must be -1 to"),
        ("engine", TEXT_OUTPUTS, {"end_id": 2_000_000_000}, None, "INVALID_ARG end_id=2000000000"),
        ("m", None, {}, PromptTooLong("prompt", "9 tokens", "most 8"), "INVALID_ARG text_input='9 tokens': most 8"),
        ("engine", None, {}, PromptTooLong("prompt", "9 tokens", "most 8"), "INVALID_ARG input_ids='9 tokens'"),
        ("engine", TEXT_OUTPUTS, {}, PromptTooLong("prompt", "9 tokens", "x"), "INVALID_ARG text_input='9 tokens'"),
        ("m", None, {"num_return_sequences": 9}, InvalidArgument("n", 9, "x"), "INVALID_ARG num_return_sequences=9"),
        ("m", None, {}, InvalidArgument("n", 9, "x"), "INVALID_ARG num_return_sequences=9"),
        ("engine", None, {"request_output_len": 9}, Unsupported("max_tokens", 9, "x"), "request_output_len=9"),
        ("engine", TEXT_OUTPUTS, {"request_output_len": 9}, Unsupported("max_tokens", 9, "x"), "ARG max_tokens=9"),
        ("engine", None, {"runtime_top_k": -9}, None, "INVALID_ARG runtime_top_k=-9"),
        ("engine", TEXT_OUTPUTS, {"runtime_top_k": -9}, None, "INVALID_ARG top_k=-9"),
        ("engine", None, {"min_length": 9, "request_output_len": 4}, None, "INVALID_ARG min_length=9"),
    ],
)
def test_errors_name_options_as_the_client_does(
    builder: GenerationBuilder,
    name: str,
    outputs: frozenset[str] | None,
    tensors: dict[str, Any],
    error: PageflightError | None,
    said: str,
) -> None:
    """They named the core's fields and the engine's tensors, of which the client had sent none."""
    assert said in ask(Model(builder, name, error), tensors, outputs=outputs)


def test_stop_token_ids_outside_the_vocabulary_keep_their_name(builder: GenerationBuilder) -> None:
    answer = ask(Model(builder, "m"), {}, more='{"stop_token_ids": "[5, 9999]"}')
    assert answer.startswith("INVALID_ARG stop_token_ids=9999: token ids must be 0 to")


@pytest.mark.parametrize(
    ("timeout_us", "tensors", "expected"),
    [(0, {}, None), (1, {}, 1), (2_500_000, {}, 2500), (2_500_000, {"timeout_ms": 7}, 7), (2**63, {}, 2**31 - 1)],
)
def test_timeout_of_the_protocol_is_the_deadline(
    builder: GenerationBuilder,
    timeout_us: int,
    tensors: dict[str, Any],
    expected: int | None,
) -> None:
    """tritonclient's `timeout=` was ignored without a word."""
    model = Model(builder, "m")
    assert ask(model, tensors, timeout_us=timeout_us) == ""
    assert model.front.taken[0].timeout_ms == expected  # type: ignore[attr-defined]


def test_unreadable_parameters_are_a_typed_error(builder: GenerationBuilder) -> None:
    for text in ("{", "[" * 100_000):
        assert ask(Model(builder, "m"), {}, more=text).startswith("INVALID_ARG parameters=")
