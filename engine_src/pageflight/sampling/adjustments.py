"""What one row changes about its logits before they are filtered: bias, masks and penalties.

V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pageflight.core.request import SamplingParams

FloatRow = NDArray[np.float32]
Int32Row = NDArray[np.int32]

_NOTHING = np.zeros(0, np.int64)


class RowAdjustments:
    """Everything but the draw itself that makes a row more than plain greedy or plain sampling.

    Order as in vLLM: logit bias, stop ids below `min_tokens`, bad words, then penalties.
    Ids beyond the vocabulary are dropped: the model cannot produce them, so there is nothing to bias or to mask.
    """

    __slots__ = ("_bad_words", "_bias", "_bias_ids", "_min_tokens", "_penalties", "_stop_ids")

    def __init__(self, sampling: SamplingParams, token_ids: Int32Row, num_prompt: int, vocab_size: int) -> None:
        bias = [(token, value) for token, value in sampling.logit_bias if 0 <= token < vocab_size]
        self._bias_ids = np.array([token for token, _ in bias], np.int64)
        self._bias = np.array([value for _, value in bias], np.float32)
        self._min_tokens = sampling.min_tokens
        stop_ids = [token for token in sampling.stop_token_ids if 0 <= token < vocab_size]
        self._stop_ids = np.array(stop_ids, np.int64) if sampling.min_tokens > 0 else _NOTHING
        self._bad_words = BadWords(sampling.bad_words_ids, vocab_size) if sampling.bad_words_ids else None
        self._penalties = Penalties(sampling, token_ids, num_prompt) if has_penalties(sampling) else None

    @staticmethod
    def needed(sampling: SamplingParams) -> bool:
        return bool(
            sampling.logit_bias
            or sampling.bad_words_ids
            or (sampling.min_tokens > 0 and sampling.stop_token_ids)
            or has_penalties(sampling)
        )

    def apply(self, logits_V: FloatRow, token_ids: Int32Row, num_output: int) -> FloatRow:
        """A changed copy of `logits_V`; `token_ids` are prompt and output so far, `num_output` the latter's length.

        When bias and masks leave no id at all they cannot be obeyed: the row then goes by its unchanged logits.
        """
        scores_V = logits_V.copy()
        with np.errstate(over="ignore"):
            self._change(scores_V, token_ids, num_output)
        peak = scores_V.max()
        if (
            peak == np.inf
        ):  # an extreme penalty or bias overflowed: as great as a score can be, but still one to compare
            np.minimum(scores_V, np.finfo(np.float32).max, out=scores_V)
        assert not np.isnan(peak), "bias and penalties are finite numbers: the border lets no others in"
        return scores_V if peak > -np.inf else logits_V

    def append(self, token: int) -> None:
        """A sampled id became the row's next token."""
        if self._penalties is not None:
            self._penalties.append(token)

    def _change(self, scores_V: FloatRow, token_ids: Int32Row, num_output: int) -> None:
        if self._bias_ids.size:
            np.add.at(scores_V, self._bias_ids, self._bias)  # an id may be named twice
        if num_output < self._min_tokens:
            scores_V[self._stop_ids] = -np.inf
        if self._bad_words is not None:
            scores_V[self._bad_words.masked(token_ids)] = -np.inf
        if self._penalties is not None:
            self._penalties.apply(scores_V)


class BadWords:
    """Id sequences that must not appear: the last id of one is masked where the others precede it."""

    __slots__ = ("_endings", "_single")

    def __init__(self, words: Sequence[tuple[int, ...]], vocab_size: int) -> None:
        usable = [word for word in words if word and all(0 <= token < vocab_size for token in word)]
        self._single = [word[-1] for word in usable if len(word) == 1]
        self._endings: dict[int, list[tuple[tuple[int, ...], int]]] = {}  # by the id just before the masked one
        for word in usable:
            if len(word) > 1:
                self._endings.setdefault(word[-2], []).append((word[:-1], word[-1]))

    def masked(self, token_ids: Int32Row) -> NDArray[np.int64]:
        """Ids that would complete a bad word after `token_ids`."""
        masked = list(self._single)
        if self._endings and token_ids.size:
            for before, last in self._endings.get(int(token_ids[-1]), ()):
                if len(before) <= token_ids.size and tuple(token_ids[-len(before) :].tolist()) == before:
                    masked.append(last)
        return np.array(masked, np.int64)


class Penalties:
    """Repetition (prompt and output), presence and frequency (output only), from counts kept per distinct id."""

    __slots__ = ("_counts", "_frequency", "_ids", "_presence", "_repetition", "_slots", "_used")

    def __init__(self, sampling: SamplingParams, token_ids: Int32Row, num_prompt: int) -> None:
        self._repetition = np.float32(sampling.repetition_penalty)
        self._presence = np.float32(sampling.presence_penalty)
        self._frequency = np.float32(sampling.frequency_penalty)
        seen = np.unique(token_ids)
        self._used = seen.size
        self._ids = np.zeros(seen.size + 64, np.int64)
        self._ids[: seen.size] = seen
        self._counts = np.zeros(self._ids.size, np.float32)
        self._slots = {token: slot for slot, token in enumerate(seen.tolist())}
        for token in token_ids[num_prompt:].tolist():
            self._counts[self._slots[token]] += 1

    def append(self, token: int) -> None:
        slot = self._slots.get(token)
        if slot is None:
            slot = self._slots[token] = self._used
            if slot == self._ids.size:
                self._ids = np.concatenate([self._ids, np.zeros(slot, np.int64)])
                self._counts = np.concatenate([self._counts, np.zeros(slot, np.float32)])
            self._ids[slot] = token
            self._used += 1
        self._counts[slot] += 1

    def apply(self, scores_V: FloatRow) -> None:
        """Change `scores_V` in place."""
        ids, counts = self._ids[: self._used], self._counts[: self._used]
        scores = scores_V[ids]
        scores = np.where(scores < 0, scores * self._repetition, scores / self._repetition)
        scores -= counts * self._frequency
        scores -= (counts > 0) * self._presence
        scores_V[ids] = scores


def has_penalties(sampling: SamplingParams) -> bool:
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
