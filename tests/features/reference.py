"""What an answer must be, computed as plainly as possible: one sequence, all tokens anew for every token, no cache.

Only the random numbers are the product's own. Options are read as the client wrote them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np

from pageflight.sampling.philox import uniforms
from pageflight.text.tokenizer import Tokenizer


class Logits(Protocol):
    def logits(self, tokens: list[int]) -> np.ndarray: ...


@dataclass(frozen=True)
class Expected:
    """A whole answer. `text` is without what ended it."""

    ids: tuple[int, ...]
    text: str
    reason: str
    log_probs: tuple[float, ...]


class Reference:
    """`margin`: how far from the best a token may be, in logits, and `slip`, how far from its interval a random number,
    because the engine's arithmetic depends on what runs beside it."""

    def __init__(self, model: Logits, tokenizer: Tokenizer, *, margin: float = 0.0, slip: float = 0.0) -> None:
        self._model, self._tokenizer, self._margin, self._slip = model, tokenizer, margin, slip
        self.is_exact = margin == 0.0
        self._answers: dict[object, Expected] = {}

    def answer(self, prompt: Sequence[int], options: Mapping[str, Any], index: int = 0) -> Expected:
        """The answer that nothing disturbs."""
        key = (tuple(prompt), repr(sorted(options.items())), index)
        if key not in self._answers:
            self._answers[key] = self._answer(prompt, options, index)
        return self._answers[key]

    def _answer(self, prompt: Sequence[int], options: Mapping[str, Any], index: int) -> Expected:
        tokens, log_probs = list(prompt), []
        while True:
            scores, raw = self._scores(tokens, len(prompt), options)
            token = self._choice(scores, len(tokens), options, index)
            tokens.append(token)
            log_probs.append(_log_prob(raw, token))
            text, reason = self.ending(tokens[len(prompt) :], options)
            if reason:
                return Expected(tuple(tokens[len(prompt) :]), text, reason, tuple(log_probs))

    def check_ids(self, prompt: Sequence[int], ids: Sequence[int], options: Mapping[str, Any], index: int) -> None:
        """Assert that each of `ids` is what had to follow the ones before it."""
        for count, token in enumerate(ids):
            tokens = [*prompt, *ids[:count]]
            scores, _raw = self._scores(tokens, len(prompt), options)
            best = self._choice(scores, len(tokens), options, index)
            assert token == best or self._is_close(scores, token, len(tokens), options, index), (
                f"token {count} of answer {index} is {token} instead of {best}"
            )

    def ending(self, ids: Sequence[int], options: Mapping[str, Any]) -> tuple[str, str]:
        """Text of `ids`, and why the answer ends with the last of them; an empty reason where it goes on."""
        least = options.get("min_tokens", 0)
        single, words = self._stop_ids(options), [tuple(word) for word in options.get("stop_words_list", ())]
        if ids[-1] in single and len(ids) > least:
            return self.text(ids[:-1], options), "stop"
        if len(ids) >= least:
            for word in words:
                if tuple(ids[-len(word) :]) == word and len(ids) - len(word) >= max(0, least - 1):
                    return self.text(ids[: -len(word)], options), "stop"
            text = self.text(ids, options)
            begin = len(self.text(ids[: max(0, least - 1)], options))
            found = [place for stop in options.get("stop_words", ()) if (place := text.find(stop, begin)) >= 0]
            if found:
                return text[: min(found)], "stop"
        return self.text(ids, options), "length" if len(ids) == options["request_output_len"] else ""

    def text(self, ids: Sequence[int], options: Mapping[str, Any]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=options.get("skip_special_tokens", True))

    def log_probs(self, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
        return [_log_prob(self._model.logits([*prompt, *ids[:count]]), token) for count, token in enumerate(ids)]

    def _stop_ids(self, options: Mapping[str, Any]) -> set[int]:
        end = options.get("end_id", self._tokenizer.special.eos_ids[0])
        ends = set() if options.get("ignore_eos") else {end}
        return ends | set(options.get("stop_token_ids", ()))

    def _scores(self, tokens: list[int], num_prompt: int, options: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Logits after bias, masks and penalties; and the model's own."""
        raw = self._model.logits(tokens)
        scores, output = raw.copy(), tokens[num_prompt:]
        for token, bias in options.get("logit_bias", {}).items():
            scores[token] += np.float32(bias)
        if len(output) < options.get("min_tokens", 0):
            scores[list(self._stop_ids(options))] = -np.inf
        for word in options.get("bad_words_list", ()):
            if not word[:-1] or tuple(tokens[-len(word[:-1]) :]) == tuple(word[:-1]):
                scores[word[-1]] = -np.inf
        repetition = np.float32(options.get("repetition_penalty", 1.0))
        for token in set(tokens):
            scores[token] = scores[token] * repetition if scores[token] < 0 else scores[token] / repetition
        for token in set(output):
            scores[token] -= np.float32(options.get("frequency_penalty", 0.0)) * np.float32(output.count(token))
            scores[token] -= np.float32(options.get("presence_penalty", 0.0))
        return scores, raw

    def _choice(self, scores: np.ndarray, position: int, options: Mapping[str, Any], index: int) -> int:
        ids, ends, uniform = self._drawing(scores, position, options, index)
        return int(ids[int(np.searchsorted(ends, uniform, side="right"))])

    def _drawing(
        self, scores: np.ndarray, position: int, options: Mapping[str, Any], index: int, *, more: int = 0
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Candidates by id, where their intervals end, and the random number that falls into one of them.

        With `more` candidates than the probabilities of the best come to `top_p` with.
        """
        asks = {"seed", "runtime_top_k", "runtime_top_p", "min_p", "temperature"} & options.keys()
        if not asks or options.get("temperature") == 0:
            return np.array([scores.argmax()]), np.ones(1), 0.0
        weights = np.exp((scores - scores.max()) / np.float32(options.get("temperature", 1.0))).astype(np.float64)
        top_k = options.get("runtime_top_k", 0)
        if top_k:
            weights[weights < np.sort(weights)[-top_k]] = 0
        weights[weights < options.get("min_p", 0.0)] = 0
        top_p = options.get("runtime_top_p", 1.0)
        if top_p < 1:
            order = np.argsort(-weights, kind="stable")
            count = int(np.searchsorted(np.cumsum(weights[order]), top_p * weights.sum())) + 1 + more
            weights[order[max(1, count) :]] = 0
        ids = np.flatnonzero(weights)
        return ids, np.cumsum(weights[ids]) / weights.sum(), _uniform(options["seed"], index, position)

    def _is_close(self, scores: np.ndarray, token: int, position: int, options: Mapping[str, Any], index: int) -> bool:
        """A candidate more or less, where the sum is near `top_p`, moves the intervals of all."""
        return any(
            self._is_near(*self._drawing(scores, position, options, index, more=more), scores, token)
            for more in ((0, -1, 1) if self._margin and options.get("runtime_top_p", 1.0) < 1 else (0,))
        )

    def _is_near(self, ids: np.ndarray, ends: np.ndarray, uniform: float, scores: np.ndarray, token: int) -> bool:
        if ids.size == 1:
            return bool(scores[token] >= scores.max() - self._margin)
        if token not in ids:
            return self._margin > 0 and bool(scores[token] >= scores[ids].min() - self._margin)
        place = int(np.flatnonzero(ids == token)[0])
        begin = ends[place - 1] if place else 0.0
        return bool(begin - self._slip <= uniform <= ends[place] + self._slip)


@cache
def _uniform(seed: int, index: int, position: int) -> float:
    numbers = [np.array([value], np.uint64) for value in (seed, index, position)]
    return float(uniforms(*numbers)[0])


def _log_prob(logits: np.ndarray, token: int) -> float:
    wide = logits.astype(np.float64)
    return float(wide[token] - wide.max() - np.log(np.exp(wide - wide.max()).sum()))
