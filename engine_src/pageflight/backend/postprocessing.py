"""Token ids to text: TensorRT-LLM's `postprocessing`, for clients of `engine` that want it.

Stateless, so it suits whole answers: the text of a streamed piece of one has no neighbours here. `engine` itself sends
text made with state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pageflight.backend import triton
from pageflight.backend.front_model import read_settings
from pageflight.backend.inputs import rows_of
from pageflight.backend.ledger import Ledger
from pageflight.backend.serving import answer_each
from pageflight.core.errors import InvalidArgument, PageflightError
from pageflight.text.tokenizer import Tokenizer


class TritonPythonModel:
    """Triton's interface; stateless."""

    def initialize(self, args: Mapping[str, str]) -> None:
        try:
            settings = read_settings(args)
            self._tokenizer = Tokenizer.load(settings.engine_dir / "tokenizer")
        except PageflightError as error:
            raise triton.start_error(args["model_name"], error) from None
        self._ledger = Ledger(settings, "postprocessing")

    def execute(self, requests: Sequence[triton.TritonRequest]) -> list[triton.TritonResponse | None]:
        with self._ledger.counting(len(requests)):
            return answer_each(requests, self._answer)

    def finalize(self) -> None:
        self._ledger.close()

    def _answer(self, request: triton.TritonRequest) -> list[triton.TritonTensor]:
        texts = []
        for row in rows_of(request, is_batched=True):
            ids, lengths = row.arrays.get("TOKENS_BATCH"), row.arrays.get("SEQUENCE_LENGTH")
            if ids is None or lengths is None or ids.ndim != 2 or lengths.shape != ids.shape[:1]:
                raise InvalidArgument("TOKENS_BATCH", None, "must be [sequences, length] with a SEQUENCE_LENGTH each")
            texts.append([self._text(*pair) for pair in zip(ids.tolist(), lengths.tolist(), strict=True)])
        array = np.array([[text.encode("utf-8", "replace") for text in row] for row in texts], dtype=np.object_)
        return [triton.tensor("OUTPUT", array)]

    def _text(self, ids: list[int], length: int) -> str:
        if not 0 <= length <= len(ids):
            raise InvalidArgument("SEQUENCE_LENGTH", length, f"must be 0 to {len(ids)}")
        for index in ids[:length]:
            if not 0 <= index < self._tokenizer.vocab_size:
                raise InvalidArgument("TOKENS_BATCH", index, f"ids must be 0 to {self._tokenizer.vocab_size - 1}")
        return self._tokenizer.decode(ids[:length])
