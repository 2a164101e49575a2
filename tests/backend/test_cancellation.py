from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from triton_python_backend_utils import Tensor

from pageflight.backend.engine import EngineModel
from pageflight.loop.sibling_stops import SiblingStops


@pytest.fixture
def folders() -> Iterator[list[Path]]:
    with tempfile.TemporaryDirectory(prefix="stops") as root:  # short: a socket's path has 107 bytes
        made = [Path(root) / str(index) for index in range(3)]
        for folder in made[:2]:
            folder.mkdir()
        yield made


def test_stop_reaches_the_instance_that_has_the_request(folders: list[Path]) -> None:
    """Each instance knew its own requests only, and a stop that Triton handed to another was refused."""
    heard: list[tuple[int, str]] = []

    def cancel_of(index: int, known: str) -> Any:
        def cancel(request_id: str) -> bool:
            heard.append((index, request_id))
            return request_id == known

        return cancel

    stops = [SiblingStops(folders, index, cancel_of(index, known)) for index, known in enumerate(("one", "two ü"))]
    assert stops[0].cancel("two ü")
    assert stops[1].cancel("two ü")
    assert stops[1].cancel("one")
    assert not stops[0].cancel("three")
    assert {index for index, request_id in heard if request_id == "three"} == {0, 1}
    for each in stops:
        each.close()


def test_an_instance_ends_although_another_has_taken_its_place(folders: list[Path]) -> None:
    """A model that was loaded again ended the new instance's thread instead of its own, and hung."""
    old = SiblingStops(folders, 0, lambda _: False)
    new = SiblingStops(folders, 0, lambda request_id: request_id == "a")
    other = SiblingStops(folders, 1, lambda _: False)
    old.close()
    assert other.cancel("a")
    new.close()
    other.close()


def test_instance_that_has_failed_to_cancel_answers_all_the_same(folders: list[Path]) -> None:
    def fails(request_id: str) -> bool:
        raise RuntimeError(request_id)

    stops = [SiblingStops(folders, 0, lambda _: False), SiblingStops(folders, 1, fails)]
    assert not stops[0].cancel("one")
    assert not stops[0].cancel("one")
    for each in stops:
        each.close()


class Sender:
    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, response: object = None, flags: int = 0) -> None:
        self.sent.append((response, flags))

    def is_cancelled(self) -> bool:
        return False


@pytest.mark.parametrize(("request_id", "cancelled"), [("", []), ("a-request", ["a-request"])])
def test_stop_without_an_id_cancels_nobody(request_id: str, cancelled: list[str]) -> None:
    """It cancelled every open request without an id, whoever's they were."""
    model = object.__new__(EngineModel)
    asked: list[str] = []
    model._stops = SimpleNamespace(cancel=lambda known: asked.append(known) or True)  # type: ignore[assignment]
    sender = Sender()
    request = SimpleNamespace(
        inputs=lambda: [Tensor("stop", np.array([[True]]))],
        request_id=lambda: request_id,
        get_response_sender=lambda: sender,
    )
    model.serve(request)
    assert asked == cancelled
    ((response, flags),) = sender.sent
    assert flags == 1
    if not request_id:
        assert response.error.code == "INVALID_ARG"
        assert "stop=True: needs the id of the request to cancel" in response.error.message
