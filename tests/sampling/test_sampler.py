from __future__ import annotations

import numpy as np
import pytest
import torch

from pageflight.core.plan import RowStart
from pageflight.core.request import SamplingParams
from pageflight.sampling.filters import candidates
from pageflight.sampling.sampler import NonFiniteLogits, Sampler

VOCAB, MAX_LEN = 3_001, 40


class Batch:
    """Rows with their tokens, and the sampler that mirrors them."""

    def __init__(self, num_rows: int, vocab: int = VOCAB) -> None:
        self.sampler = Sampler(max_num_seqs=num_rows, vocab_size=vocab)
        self.tokens = np.zeros((num_rows, MAX_LEN), np.int32)
        self.num_tokens = np.zeros(num_rows, np.int32)

    def start(
        self, row: int, sampling: SamplingParams, prompt: list[int], output: tuple[int, ...] = (), index: int = 0
    ) -> None:
        ids = np.array([*prompt, *output], np.int32)
        self.tokens[row, : ids.size], self.num_tokens[row] = ids, ids.size
        self.sampler.start(RowStart(row, row, index, ids, len(prompt), sampling))

    def sample(self, logits: np.ndarray, rows: list[int]) -> tuple[np.ndarray, np.ndarray | None]:
        rows_L = np.array(rows, np.int32)
        ids, log_probs = self.sampler.sample(logits, rows_L, self.tokens, self.num_tokens)
        self.tokens[rows_L, self.num_tokens[rows_L]] = ids
        self.num_tokens[rows_L] += 1
        return ids, log_probs


def some_params(number: int) -> SamplingParams:
    """One of many mixtures, by number."""
    generator = np.random.default_rng(number)

    def maybe(value: float, otherwise: float) -> float:
        return float(value) if generator.random() < 0.4 else otherwise

    return SamplingParams(
        temperature=maybe(0.0, generator.uniform(0.2, 2.0)),
        top_k=int(maybe(generator.integers(1, 100), 0)),
        top_p=maybe(generator.uniform(0.05, 1.0), 1.0),
        min_p=maybe(generator.uniform(0.0, 0.2), 0.0),
        repetition_penalty=maybe(generator.uniform(0.8, 1.5), 1.0),
        presence_penalty=maybe(generator.uniform(-1, 1), 0.0),
        frequency_penalty=maybe(generator.uniform(-1, 1), 0.0),
        seed=int(generator.integers(0, 2**63)),
        min_tokens=int(maybe(3, 0)),
        stop_token_ids=(1, 2),
        bad_words_ids=((5,), (7, 8)) if generator.random() < 0.3 else (),
        logit_bias=((9, 3.0),) if generator.random() < 0.3 else (),
        log_probs=bool(generator.random() < 0.4),
    )


def test_many_rows_together_equal_each_row_alone_bit_for_bit() -> None:
    """A reduction over the whole batch rounds differently from one over a row; text then changes with its company."""
    count, steps = 48, 6
    logits = np.random.default_rng(5).standard_normal((steps, count, VOCAB)).astype(np.float32) * 3
    logits.setflags(write=False)  # the engine's buffer is not ours to change
    together = Batch(count)
    alone = [Batch(3) for _ in range(count)]
    for number in range(count):
        together.start(number, some_params(number), [3, number])
        alone[number].start(2, some_params(number), [3, number])
    order = np.random.default_rng(6)
    for step in range(steps):
        rows = order.permutation(count).tolist()
        ids, log_probs = together.sample(logits[step, rows], rows)
        for place, row in enumerate(rows):
            id_alone, log_prob_alone = alone[row].sample(logits[step, row : row + 1].copy(), [2])
            assert ids[place] == id_alone[0], f"row {row} at step {step} depends on its neighbours"
            if log_prob_alone is not None:
                assert log_probs is not None and log_probs[place] == log_prob_alone[0]
            elif log_probs is not None:
                assert np.isnan(log_probs[place])


def test_a_resumed_row_goes_on_as_if_it_had_never_stopped() -> None:
    """After preemption the penalty counts and the position must be those of prompt + output."""
    sampling = SamplingParams(temperature=1.0, frequency_penalty=1.5, repetition_penalty=1.2, seed=3, min_tokens=6)
    logits = np.random.default_rng(1).standard_normal((8, 1, VOCAB)).astype(np.float32)
    whole, first, second = Batch(1), Batch(1), Batch(4)
    whole.start(0, sampling, [4, 5])
    expected = [int(whole.sample(line, [0])[0][0]) for line in logits]
    first.start(0, sampling, [4, 5])
    begun = tuple(int(first.sample(line, [0])[0][0]) for line in logits[:3])
    second.start(3, sampling, [4, 5], begun)
    rest = [int(second.sample(line, [3])[0][0]) for line in logits[3:]]
    assert [*begun, *rest] == expected


def test_a_row_that_ended_leaves_nothing_to_the_next() -> None:
    batch = Batch(1)
    batch.start(0, SamplingParams(temperature=1.0, bad_words_ids=((7,),), log_probs=True), [1])
    batch.sampler.end(0)
    batch.start(0, SamplingParams(), [1])
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 7] = 1.0
    ids, log_probs = batch.sample(logits, [0])
    assert ids.tolist() == [7] and log_probs is None


def test_siblings_of_one_request_draw_differently_and_repeatably() -> None:
    logits = np.zeros((1, VOCAB), np.float32)

    def draw(seed: int, index: int) -> list[int]:
        batch = Batch(1)
        batch.start(0, SamplingParams(temperature=1.0, seed=seed), [1, 2], index=index)
        return [int(batch.sample(logits, [0])[0][0]) for _ in range(8)]

    assert draw(1, 0) == draw(1, 0)
    assert len({tuple(draw(seed, index)) for seed in (1, 2, -1) for index in (0, 1, 2)}) == 9


@pytest.mark.parametrize("options", [{}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.2}, {"temperature": 0.6}], ids=str)
def test_frequencies_match_the_filtered_distribution(options: dict[str, float]) -> None:
    """Chi-square of 20,000 draws over positions of one row; p is 1e-4 that a right sampler fails, and it is seeded."""
    vocab, count = 12, 20_000
    params = SamplingParams(**{"temperature": 1.0, "seed": 11, **options})  # type: ignore[arg-type]
    scores = np.random.default_rng(3).standard_normal(vocab).astype(np.float32)
    sampler = Sampler(max_num_seqs=1, vocab_size=vocab)
    sampler.start(RowStart(0, 0, 0, np.array([1], np.int32), 1, params))
    tokens, row = np.zeros((1, 1), np.int32), np.zeros(1, np.int32)
    observed = np.zeros(vocab)
    for position in range(count):
        ids, _ = sampler.sample(scores[None], row, tokens, np.array([position], np.int32))
        observed[ids[0]] += 1
    found = candidates(
        scores,
        float(scores.max()),
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
    )
    expected = np.zeros(vocab)
    expected[slice(None) if found.ids_N is None else found.ids_N] = found.weights_N / found.weights_N.sum() * count
    assert not observed[expected == 0].any()
    kept = expected > 0
    chi_square = ((observed[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    freedom = int(kept.sum()) - 1
    critical = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3  # Wilson and Hilferty, 1931
    assert freedom >= 1 and chi_square < critical


def test_log_probs_are_those_of_the_model_before_every_change() -> None:
    generator = np.random.default_rng(2)
    logits = (generator.standard_normal((3, VOCAB)) * 20).astype(np.float32)
    batch = Batch(3)
    batch.start(0, SamplingParams(log_probs=True), [1])
    batch.start(1, SamplingParams(temperature=0.5, top_k=10, presence_penalty=1.0, log_probs=True), [1], (4,))
    batch.start(2, SamplingParams(), [1])
    ids, log_probs = batch.sample(logits, [0, 1, 2])
    expected = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    assert log_probs is not None and log_probs.dtype == np.float32
    np.testing.assert_allclose(log_probs[:2], expected[[0, 1], ids[:2]], rtol=1e-5, atol=1e-6)
    assert np.isnan(log_probs[2])


def test_top_k_one_is_greedy_even_among_ties() -> None:
    batch = Batch(1)
    batch.start(0, SamplingParams(temperature=1.0, top_k=1, seed=9), [1])
    assert all(batch.sample(np.zeros((1, VOCAB), np.float32), [0])[0][0] == 0 for _ in range(5))


def test_greedy_with_penalties_takes_the_greatest_changed_score() -> None:
    batch = Batch(1)
    batch.start(0, SamplingParams(presence_penalty=1.0), [1])
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, [6, 7]] = 2.0, 1.5
    assert [int(batch.sample(logits, [0])[0][0]) for _ in range(3)] == [6, 7, 6]


@pytest.mark.parametrize("bad", [np.nan, np.inf, "all -inf"])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, presence_penalty=1.0)])
def test_logits_that_are_no_numbers_are_an_error_that_names_the_rows(bad: float | str, params: SamplingParams) -> None:
    """argmax of a NaN row is a token like any other; text came out."""
    batch = Batch(4)
    for row in range(4):
        batch.start(row, params, [1])
    logits = np.zeros((3, VOCAB), np.float32)
    if isinstance(bad, str):
        logits[1] = -np.inf
    else:
        logits[1, VOCAB - 1] = bad
    with pytest.raises(NonFiniteLogits, match=r"rows \[3\]") as caught:
        batch.sample(logits, [0, 3, 2])
    assert caught.value.rows == (3,)


def test_no_rows_give_no_ids() -> None:
    ids, log_probs = Batch(2).sample(np.zeros((0, VOCAB), np.float32), [])
    assert ids.shape == (0,) and ids.dtype == np.int32 and log_probs is None
