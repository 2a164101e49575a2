"""From checked options and a prompt to a `Generation`: defaults, words to token ids, what cannot work together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from pageflight.backend.options import Options
from pageflight.core.errors import InvalidArgument, PromptTooLong, Unsupported
from pageflight.core.manifest import EngineManifest
from pageflight.core.request import SamplingParams
from pageflight.loop.open_sequence import Generation
from pageflight.text.tokenizer import Tokenizer

_PROBE_CHARACTERS_PER_TOKEN = 8
_GREEDY = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWishes:
    """What only clients of `engine` can ask for, in token ids."""

    stop_ids: tuple[tuple[int, ...], ...] = ()
    bad_ids: tuple[tuple[int, ...], ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()


class GenerationBuilder:
    """Makes generations for one checkpoint. Safe to use from several threads."""

    def __init__(
        self, manifest: EngineManifest, tokenizer: Tokenizer, *, default_max_tokens: int, exclude_input_in_output: bool
    ) -> None:
        self.manifest, self.tokenizer = manifest, tokenizer
        self.exclude_input_in_output = exclude_input_in_output
        self._default_max_tokens = default_max_tokens
        self.max_model_len = manifest.max_model_len
        """Of the engine; whoever knows how much the cache holds lowers it to that."""

    def encode_prompt(self, option: str, text: str) -> tuple[int, ...]:
        """Token ids of a prompt. Raises InvalidArgument for an empty one, PromptTooLong without reading all of it."""
        if not text:
            raise InvalidArgument(option, text, "must not be empty")
        limit = self.max_model_len
        if self.tokenizer.fewest_tokens(text) > limit:
            raise PromptTooLong(option, f"{len(text)} characters", f"more than {limit} tokens; max_model_len={limit}")
        probe_characters = limit * _PROBE_CHARACTERS_PER_TOKEN
        if len(text) > 2 * probe_characters:
            num_probed = len(self.tokenizer.encode(text[:probe_characters], add_special_tokens=False))
            # Cutting the text may split one token; what follows the probe adds tokens of its own.
            if num_probed > limit:
                raise PromptTooLong(
                    option, f"{len(text)} characters", f"more than {limit} tokens; max_model_len={limit}"
                )
        ids = self.tokenizer.encode(text)
        bos = self.manifest.bos_token_id
        if self.manifest.add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        if not ids:
            raise InvalidArgument(option, text, "has no tokens")
        return tuple(ids)

    def encode_word(self, word: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(word, add_special_tokens=False))

    def word_variants(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word's token ids, at the beginning of a text and after a space."""
        variants = (text for word in words for text in (word, f" {word}"))
        return tuple(dict.fromkeys(ids for text in variants if (ids := self.encode_word(text))))

    def build(
        self, prompt_ids: tuple[int, ...], options: Options, wishes: TokenWishes | None = None, *, request_id: str = ""
    ) -> Generation:
        """Raises InvalidArgument and Unsupported for options that cannot work together."""
        wishes = wishes or TokenWishes()
        stream = options.get("stream", False)
        if stream and options.get("exclude_input_in_output") is False:
            raise Unsupported("exclude_input_in_output", False, "a streamed answer cannot start with the prompt")
        return Generation(
            prompt_ids=prompt_ids,
            sampling=self._sampling(len(prompt_ids), options, wishes),
            stop=options.get("stop_words", ()),
            stop_ids=wishes.stop_ids,
            stream=stream,
            priority=options.get("priority", 0),
            timeout_ms=options.get("timeout_ms"),
            tenant=options.get("tenant", ""),
            cache_salt=options.get("cache_salt", ""),
            kv_retention_priority=options.get("kv_retention_priority"),
            skip_special_tokens=options.get("skip_special_tokens", True),
            request_id=request_id,
        )

    def pad_id(self, options: Options) -> int:
        """What fills the shorter rows of `output_ids`."""
        default = self.manifest.pad_token_id
        if default is None:
            default = self.manifest.eos_token_ids[0] if self.manifest.eos_token_ids else 0
        pad_id: int = options.get("pad_id", default)
        return pad_id

    def _sampling(self, num_prompt: int, options: Options, wishes: TokenWishes) -> SamplingParams:
        max_tokens = options.get("max_tokens")
        min_tokens = options.get("min_tokens", 0)
        if max_tokens is None:
            max_tokens = max(1, min(max(self._default_max_tokens, min_tokens), self.max_model_len - num_prompt))
        if min_tokens > max_tokens:
            raise InvalidArgument("min_tokens", min_tokens, f"must be at most max_tokens={max_tokens}")
        temperature, top_k, top_p, min_p = self._randomness(options)
        seed = options.get("seed")
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            n=options.get("num_return_sequences", 1),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=options.get("repetition_penalty", self._default("repetition_penalty", 1.0)),
            presence_penalty=options.get("presence_penalty", 0.0),
            frequency_penalty=options.get("frequency_penalty", 0.0),
            seed=random.getrandbits(63) if seed is None else seed,
            stop_token_ids=self._stop_token_ids(options),
            logit_bias=self._logit_bias(options, wishes),
            bad_words_ids=(*self.word_variants(options.get("bad_words", ())), *wishes.bad_ids),
            log_probs=options.get("return_log_probs", False),
        )

    def _randomness(self, options: Options) -> tuple[float, int, float, float]:
        """Temperature, top-k, top-p, min-p. Greedy unless the request, or the checkpoint, asks for randomness.

        What the request leaves open is the checkpoint's own where that samples (`do_sample`), else neutral. A request
        asks for randomness by a temperature, a seed, or a filter that filters: not by naming the value that is off.
        """
        samples = bool(self.manifest.generation.get("do_sample"))
        own = self._default if samples else lambda _name, neutral: neutral
        top_k = max(0, options.get("top_k", int(own("top_k", 0))))
        top_p = options.get("top_p", own("top_p", 1.0))
        min_p = options.get("min_p", own("min_p", 0.0))
        asks = samples or "seed" in options or top_k > 1 or top_p < 1.0 or min_p > 0.0
        temperature = options.get("temperature", own("temperature", 1.0) if asks else _GREEDY)
        if temperature == _GREEDY or top_k == 1 or top_p == 0.0:  # one token is left to choose from
            return _GREEDY, 0, 1.0, 0.0
        return temperature, top_k, top_p, min_p

    def _default(self, name: str, neutral: float) -> float:
        value = self.manifest.generation.get(name)
        return neutral if value is None else float(value)

    def _stop_token_ids(self, options: Options) -> tuple[int, ...]:
        end_id = options.get("end_id")
        if options.get("ignore_eos", False):
            if end_id is not None and end_id >= 0:
                raise Unsupported("ignore_eos", True, f"end_id={end_id} names the token to end at; give one of the two")
            ends: tuple[int, ...] = ()
        elif end_id is None:
            ends = self.manifest.eos_token_ids
        else:
            ends = (end_id,) if end_id >= 0 else ()
        return tuple(dict.fromkeys((*ends, *options.get("stop_token_ids", ()))))

    def _logit_bias(self, options: Options, wishes: TokenWishes) -> tuple[tuple[int, float], ...]:
        words, weights = options.get("embedding_bias_words", ()), options.get("embedding_bias_weights", ())
        if len(words) != len(weights):
            raise InvalidArgument(
                "embedding_bias_weights", f"{len(weights)} entries", f"embedding_bias_words has {len(words)} entries"
            )
        bias = dict(wishes.logit_bias)
        for index, weight in options.logit_bias.items():
            bias[index] = bias.get(index, 0.0) + weight
        for word, weight in zip(words, weights, strict=True):
            for index in self.encode_word(word):
                bias[index] = bias.get(index, 0.0) + weight
        for index in bias:
            if not 0 <= index < self.manifest.vocab_size:
                raise InvalidArgument("logit_bias", index, f"token ids must be 0 to {self.manifest.vocab_size - 1}")
        return tuple(bias.items())
