from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from pageflight.core.request import SamplingParams
from pageflight.sampling.adjustments import RowAdjustments

VOCAB = 50


def logits(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32)


def apply(sampling: SamplingParams, prompt: list[int], output: list[int], scores: np.ndarray) -> np.ndarray:
    """As the first half of the output were known at the start of the row, and the rest sampled since."""
    ids = np.array(prompt + output, np.int32)
    known = len(prompt) + len(output) // 2
    adjustments = RowAdjustments(sampling, ids[:known], len(prompt), VOCAB)
    for token in ids[known:].tolist():
        adjustments.append(token)
    return adjustments.apply(scores, ids, len(output))


def test_repetition_penalty_is_that_of_transformers_over_prompt_and_output() -> None:
    prompt, output, scores = [1, 2, 2, 3], [7, 3, 9, 7], logits()
    got = apply(SamplingParams(repetition_penalty=1.7), prompt, output, scores)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + output]), torch.from_numpy(scores)[None])
    np.testing.assert_allclose(got, expected[0].numpy(), rtol=1e-6)


def test_presence_and_frequency_penalties_count_output_only() -> None:
    prompt, output, scores = [1, 2, 7], [7, 3, 9, 7, 7, 11], logits()
    got = apply(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), prompt, output, scores)
    expected = scores.copy()
    for token, count in Counter(output).items():
        expected[token] -= 0.5 + 0.25 * count
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_counts_grow_past_the_room_reserved_at_the_start() -> None:
    """Distinct ids beyond the first allocation were written over each other."""
    vocab = 1_000
    adjustments = RowAdjustments(SamplingParams(frequency_penalty=1.0), np.array([0], np.int32), 1, vocab)
    for token in [*range(500), *range(400)]:
        adjustments.append(token)
    got = adjustments.apply(np.zeros(vocab, np.float32), np.array([0], np.int32), 900)
    assert got[:400].tolist() == [-2.0] * 400 and got[400:500].tolist() == [-1.0] * 100 and not got[500:].any()


@pytest.mark.parametrize("tail", [[4, 5], [5], [1, 4, 5, 4, 5], [4, 6, 5], []])
def test_bad_words_are_those_of_transformers(tail: list[int]) -> None:
    words = ((8,), (4, 5, 6), (5, 7), (1, 4, 5, 4, 5, 9), (30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40))
    prompt, scores = [2, 3], logits()
    got = apply(SamplingParams(bad_words_ids=words), prompt, tail, scores)
    processor = NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=0)
    expected = processor(torch.tensor([prompt + tail]), torch.from_numpy(scores)[None])[0].numpy()
    assert np.flatnonzero(got == -np.inf).tolist() == np.flatnonzero(expected == -np.inf).tolist()
    assert got[8] == -np.inf


def test_a_bad_word_may_begin_in_the_prompt() -> None:
    got = apply(SamplingParams(bad_words_ids=((3, 9),)), [2, 3], [], logits())
    assert np.flatnonzero(got == -np.inf).tolist() == [9]


def test_logit_bias_is_that_of_transformers_and_adds_up() -> None:
    scores = logits()
    got = apply(SamplingParams(logit_bias=((3, 2.5), (4, -1.0), (3, 1.0))), [1], [], scores)
    processor = SequenceBiasLogitsProcessor([[[3], 3.5], [[4], -1.0]])
    np.testing.assert_allclose(got, processor(torch.tensor([[1]]), torch.from_numpy(scores)[None])[0].numpy())


def test_stop_ids_wait_for_min_tokens() -> None:
    sampling = SamplingParams(min_tokens=2, stop_token_ids=(0, 5))
    masked = [np.flatnonzero(apply(sampling, [1], [2] * count, logits()) == -np.inf).tolist() for count in range(4)]
    assert masked == [[0, 5], [0, 5], [], []]


def test_bias_does_not_lift_a_mask_and_penalties_come_last() -> None:
    sampling = SamplingParams(
        logit_bias=((5, 100.0), (6, 3.0)), bad_words_ids=((5,),), repetition_penalty=2.0, presence_penalty=1.0
    )
    got = apply(sampling, [1], [6], np.ones(VOCAB, np.float32))
    assert got[5] == -np.inf
    assert got[6] == (1.0 + 3.0) / 2.0 - 1.0


def test_masks_that_leave_nothing_fall_back_to_the_unchanged_logits() -> None:
    """Every id masked gave NaN probabilities and id 0."""
    scores = logits()
    sampling = SamplingParams(bad_words_ids=tuple((token,) for token in range(VOCAB)), logit_bias=((3, 9.0),))
    assert apply(sampling, [1], [], scores).tolist() == scores.tolist()


def test_ids_beyond_the_vocabulary_are_no_index_error() -> None:
    sampling = SamplingParams(
        logit_bias=((VOCAB, 1.0),), bad_words_ids=((VOCAB + 3,), (1, VOCAB)), min_tokens=5, stop_token_ids=(VOCAB, 4)
    )
    got = apply(sampling, [1], [], logits())
    assert np.flatnonzero(got != logits()).tolist() == [4]


def test_extreme_penalties_stay_comparable() -> None:
    """1 / 1e-38 overflows to inf, and inf - inf is NaN."""
    scores = np.full(VOCAB, 3.0, np.float32)
    got = apply(SamplingParams(repetition_penalty=1e-38, logit_bias=((2, 3e38),)), [2, 4], [], scores)
    assert np.isfinite(got).all() and got[2] == got.max()


def test_the_models_logits_are_not_changed() -> None:
    scores = logits()
    scores.setflags(write=False)
    apply(SamplingParams(presence_penalty=1.0, bad_words_ids=((1,),)), [1], [2], scores)
