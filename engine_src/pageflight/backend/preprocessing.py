"""Text to token ids: TensorRT-LLM's `preprocessing`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pageflight.backend import triton
from pageflight.backend.front_model import read_settings
from pageflight.backend.generations import GenerationBuilder
from pageflight.backend.inputs import Row, as_word_list, parameters_of, rows_of
from pageflight.backend.ledger import Ledger
from pageflight.backend.options import Options, as_text
from pageflight.backend.orphans import end_orphans
from pageflight.backend.serving import answer_each
from pageflight.core import wire
from pageflight.core.errors import InvalidArgument, PageflightError
from pageflight.core.manifest import EngineManifest
from pageflight.text.tokenizer import Tokenizer

_QUERY = "QUERY"
_PROMPT = "text_input (QUERY)"
"""What errors call the prompt: clients of an ensemble know it by the first name."""


class TritonPythonModel:
    """Triton's interface; stateless, several instances."""

    def initialize(self, args: Mapping[str, str]) -> None:
        try:
            settings = read_settings(args)
            manifest = EngineManifest.read(settings.engine_dir)
            tokenizer = Tokenizer.load(settings.engine_dir / "tokenizer")
        except PageflightError as error:
            raise triton.start_error(args["model_name"], error) from None
        self._builder = GenerationBuilder(manifest, tokenizer, default_max_tokens=1, exclude_input_in_output=True)
        self._ledger = Ledger(settings, "preprocessing")

    def execute(self, requests: Sequence[triton.TritonRequest]) -> list[triton.TritonResponse | None]:
        with self._ledger.counting(len(requests)):
            return answer_each(requests, self._answer)

    def finalize(self) -> None:
        self._ledger.close()

    def _answer(self, request: triton.TritonRequest) -> list[triton.TritonTensor] | None:
        tensors = self._tensors(request)
        return None if end_orphans(parameters_of(request), request, tensors) else tensors

    def _tensors(self, request: triton.TritonRequest) -> list[triton.TritonTensor]:
        rows = list(rows_of(request, is_batched=True))
        options = [self._options(row) for row in rows]
        prompts = [self._builder.encode_prompt(_PROMPT, as_text(_PROMPT, row.text(_QUERY))) for row in rows]
        end_ids = self._builder.manifest.eos_token_ids
        pad_ids = [self._builder.pad_id(wishes) for wishes in options]
        length = max(len(ids) for ids in prompts)
        padded = [list(ids) + [pad] * (length - len(ids)) for ids, pad in zip(prompts, pad_ids, strict=True)]
        ends = [wishes.get("end_id", end_ids[0] if end_ids else -1) for wishes in options]
        tensors = [
            triton.tensor("INPUT_ID", np.array(padded, dtype=np.int32)),
            triton.tensor("REQUEST_INPUT_LEN", _column([len(ids) for ids in prompts])),
            triton.tensor("OUT_END_ID", _column(ends)),
            triton.tensor("OUT_PAD_ID", _column(pad_ids)),
        ]
        if "max_tokens" in options[0]:
            tensors.append(triton.tensor("REQUEST_OUTPUT_LEN", _column([w.get("max_tokens") for w in options])))
        encoders = (("STOP_WORDS_IDS", "stop_words", self._stop_ids), ("BAD_WORDS_IDS", "bad_words", self._bad_ids))
        for name, option, encode in encoders:
            if option in options[0]:
                words = [as_word_list(encode(wishes.get(option))) for wishes in options]
                width = max(word.shape[1] for word in words)
                rows_2w = [np.pad(word, ((0, 0), (0, width - word.shape[1])), constant_values=-1) for word in words]
                tensors.append(triton.tensor(name, np.stack(rows_2w)))
        if "embedding_bias_words" in options[0]:
            tensors.append(triton.tensor("EMBEDDING_BIAS", np.stack([self._bias(wishes) for wishes in options])))
        return tensors

    def _options(self, row: Row) -> Options:
        options = Options()
        row.add_options(options, wire.PREPROCESSING_INPUTS)
        return options

    def _stop_ids(self, words: Sequence[str]) -> Sequence[tuple[int, ...]]:
        return [self._builder.encode_word(word) for word in words]

    def _bad_ids(self, words: Sequence[str]) -> Sequence[tuple[int, ...]]:
        return self._builder.word_variants(words)

    def _bias(self, options: Options) -> np.typing.NDArray[np.float32]:
        words, weights = options.get("embedding_bias_words", ()), options.get("embedding_bias_weights", ())
        if len(words) != len(weights):
            raise InvalidArgument(
                "EMBEDDING_BIAS_WEIGHTS", f"{len(weights)} entries", f"EMBEDDING_BIAS_WORDS has {len(words)} entries"
            )
        bias = np.zeros(self._builder.manifest.vocab_size, dtype=np.float32)
        for word, weight in zip(words, weights, strict=True):
            for index in self._builder.encode_word(word):
                bias[index] += weight
        return bias


def _column(values: Sequence[int]) -> np.typing.NDArray[np.int32]:
    return np.array(values, dtype=np.int32).reshape(-1, 1)
