"""The model named after the checkpoint: text in, text out, in one hop, streamed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pageflight.backend import triton
from pageflight.backend.front_model import FrontModel, core_addresses, read_settings
from pageflight.backend.generations import TokenWishes
from pageflight.backend.inputs import Row
from pageflight.backend.options import as_text
from pageflight.backend.settings import ModelSettings
from pageflight.core import wire
from pageflight.core.errors import PageflightError

_INPUT = "text_input"


class TextModel(FrontModel):
    """Text in, text out, on the cores of the engine model: by default on that of the same instance number."""

    def __init__(self, settings: ModelSettings, *, may_stream: bool) -> None:
        num_cores = settings.number("engine_instances", 1)
        addresses = core_addresses(settings, settings.text("engine_model"), num_cores)
        super().__init__(settings, addresses, tensors=wire.TEXT_INPUTS, may_stream=may_stream)

    def prompt_of(self, row: Row) -> tuple[tuple[int, ...], TokenWishes, Callable[[], str]]:
        text = as_text(_INPUT, row.text(_INPUT))
        return self.builder.encode_prompt(_INPUT, text), TokenWishes(), lambda: text


class TritonPythonModel:
    """Triton's interface to `TextModel`; decoupled."""

    _may_stream = True

    def initialize(self, args: Mapping[str, str]) -> None:
        try:
            self._model = TextModel(read_settings(args), may_stream=self._may_stream)
            self._model.start()
        except PageflightError as error:
            raise triton.start_error(args["model_name"], error) from None

    def execute(self, requests: Sequence[triton.TritonRequest]) -> None:
        for request in requests:
            self._model.serve(request)

    def is_ready(self) -> bool:
        """Asked with every readiness check by servers that know this; 2.51 does not."""
        return self._model.is_ready

    def finalize(self) -> None:
        self._model.close()
