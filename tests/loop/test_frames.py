"""Frames between fronts and core."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageflight.core import errors
from pageflight.core.errors import STATUS, InvalidArgument, PageflightError, QueueFull, status_of
from pageflight.core.request import Request, SamplingParams
from pageflight.loop.frames import (
    BadFrame,
    Submit,
    decode_from_core,
    decode_from_front,
    encode,
    error_from_wire,
    error_to_wire,
)
from pageflight.loop.reports import Report, parse_reports


def test_a_request_arrives_as_it_was_sent() -> None:
    request = Request(
        handle=3,
        prompt_ids=tuple(range(1000)),
        sampling=SamplingParams(
            seed=2**64 - 1, logit_bias=((4, -1.5),), bad_words_ids=((1, 2), (3,)), stop_token_ids=(7,), temperature=0.1
        ),
        arrival_s=1.5,
        deadline_s=2.5,
        tenant="ä",
        output_ids=(5, 6),
    )
    assert decode_from_front(encode(Submit(9, b"front", request))) == Submit(9, b"front", request)


@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_frame_are_told_from_frames(data: bytes) -> None:
    for decode in (decode_from_front, decode_from_core):
        try:
            decode(data)
        except BadFrame:
            continue


def test_every_error_keeps_its_class_status_and_message_between_processes() -> None:
    """A queue that was full became an internal error on the way."""
    for cls in STATUS:
        name, message = error_to_wire(error_from_wire(cls.__name__, "prompt='x': too long"))
        error = error_from_wire(name, message)
        assert type(error) is cls and str(error) == "prompt='x': too long" and status_of(error) == STATUS[cls]
    original = InvalidArgument("top_k", -1, "must be at least 0")
    copy = error_from_wire(*error_to_wire(original))
    assert isinstance(copy, InvalidArgument) and copy.option == "top_k" and copy.limit == original.limit
    assert str(error_from_wire(*error_to_wire(QueueFull(5, 4)))) == str(QueueFull(5, 4))


def test_a_foreign_exception_names_its_class() -> None:
    assert error_to_wire(KeyError("x")) == ("PageflightError", "KeyError: 'x'")
    assert type(error_from_wire("NoSuchClass", "m")) is PageflightError
    assert errors.STATUS[PageflightError].triton == "INTERNAL"


def test_reports_are_whole_lines() -> None:
    buffer = bytearray(b'{"kind":"progress","message":"a"}\n{"kind":"re')
    assert parse_reports(buffer) == [Report("progress", "a")]
    buffer += b'ady"}\n'
    assert parse_reports(buffer) == [Report("ready")] and not buffer


def test_wrong_types_inside_a_frame_are_bad_frames() -> None:
    request = Request(handle=3, prompt_ids=("a",), sampling=SamplingParams())  # type: ignore[arg-type]
    with pytest.raises(BadFrame):
        decode_from_front(encode(Submit(9, b"front", request)))
