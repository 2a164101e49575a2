"""Bad requests: each has to be refused, by name and without a traceback, and must not disturb anybody."""

from __future__ import annotations

import json

from perf.soak.errand import Fault, Target, Via

_TRITONS_OWN = frozenset((400, 500))
"""What Triton 2.51 cannot parse it answers itself, mostly with 500."""


def _json(name: str, expected: str, target: Target = Target.TEXT, via: Via = Via.HTTP, **body: object) -> Fault:
    return Fault(name=name, via=via, target=target, body=json.dumps(body).encode(), expected=expected)


def faults(max_model_len: int, vocab_size: int) -> list[Fault]:
    """One of every kind."""
    too_long = "a b " * (4 * max_model_len)
    return [
        _json("an empty prompt", "text_input='': must not be empty", text_input=""),
        _json("no prompt", "text_input=None: is required", max_tokens=4),
        _json("a temperature below zero", "temperature=-1.0", text_input="x", temperature=-1),
        _json("top_p above one", "top_p=7.0", via=Via.SSE, text_input="x", top_p=7, stream=True),
        _json("an unknown option", "there is no such option", text_input="x", max_tokenz=4),
        _json("too many tokens", f"max_tokens={10 * max_model_len}", text_input="x", max_tokens=10 * max_model_len),
        _json("a prompt that is too long", "max_model_len", via=Via.SSE, text_input=too_long, stream=True),
        _json("a feature that is not built", "not supported by this build", text_input="x", lora_name="mine"),
        _json("options that exclude each other", "ignore_eos=True", text_input="x", ignore_eos=True, end_id=3),
        _json("too many sequences", "num_return_sequences=65", text_input="x", num_return_sequences=65),
        _json("a stream from a model that has none", "stream=True", Target.UNARY, text_input="x", stream=True),
        Fault(
            name="half a JSON object",
            via=Via.HTTP,
            target=Target.TEXT,
            body=b'{"text_input": "x", "max',
            expected="parse",
            statuses=_TRITONS_OWN,
        ),
        Fault(
            name="a number as text",
            via=Via.HTTP,
            target=Target.TEXT,
            body=b'{"text_input": [1, 2]}',
            expected="parse",
            statuses=_TRITONS_OWN,
        ),
        Fault(
            name="an unknown model",
            via=Via.HTTP,
            target=Target.TEXT,
            body=b'{"text_input": "x"}',
            model="nobody",
            expected="unknown model",
            statuses=frozenset((400, 404)),
        ),
        Fault(
            name="a tensor of another type",
            via=Via.HTTP,
            target=Target.UNARY,
            method="infer",
            body=b'{"inputs": [{"name": "text_input", "datatype": "INT32", "shape": [1], "data": [1]}]}',
            expected="data-type is 'INT32'",
        ),
        Fault(
            name="a token id beyond the vocabulary",
            via=Via.GRPC,
            target=Target.ENGINE,
            expected="token ids must be",
            values=(("input_ids", (1, vocab_size + 7)), ("input_lengths", 2), ("request_output_len", 4)),
        ),
        Fault(
            name="more prompt than there is",
            via=Via.GRPC,
            target=Target.ENGINE,
            expected="input_lengths=9",
            values=(("input_ids", (1, 2)), ("input_lengths", 9), ("request_output_len", 4)),
        ),
        Fault(
            name="a penalty of zero",
            via=Via.GRPC,
            target=Target.ENSEMBLE,
            expected="repetition_penalty=0",
            values=(("text_input", "x"), ("max_tokens", 4), ("repetition_penalty", 0.0)),
        ),
        Fault(
            name="a stop for nobody",
            via=Via.GRPC,
            target=Target.ENGINE,
            expected="no request with this id is open",
            values=(("input_ids", (1,)), ("input_lengths", 1), ("request_output_len", 1), ("stop", True)),
        ),
    ]
