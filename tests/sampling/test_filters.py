from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pageflight.sampling.filters import Candidates, candidates, draw_index

SIZES = (7, 300, 4_099, 32_000)


def row(size: int, spread: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def run(scores: np.ndarray, **options: float) -> Candidates:
    arguments = {"temperature": 1.0, **options}
    return candidates(scores, float(scores.max()), **arguments)  # type: ignore[arg-type]


def dense(found: Candidates, size: int) -> np.ndarray:
    ids = np.arange(size) if found.ids_N is None else found.ids_N
    probabilities = np.zeros(size)
    probabilities[ids] = found.weights_N / found.weights_N.sum(dtype=np.float64)
    return probabilities


def reference(
    scores: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """transformers' own processors in double precision, in vLLM's order."""
    x = torch.from_numpy(scores.astype(np.float64))[None]
    ids = torch.zeros((1, 1), dtype=torch.long)
    x = TemperatureLogitsWarper(float(temperature))(ids, x)
    if min_p > 0:
        x = MinPLogitsWarper(min_p)(ids, x)
    if top_k > 0:
        x = TopKLogitsWarper(top_k)(ids, x)
    if top_p < 1:
        x = TopPLogitsWarper(top_p)(ids, x)
    return np.asarray(torch.softmax(x, -1)[0].numpy())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spread", [0.05, 1.0, 8.0])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_k": 50, "temperature": 1.3},
        {"top_k": 2_000},
        {"top_p": 0.1},
        {"top_p": 0.9, "temperature": 0.8},
        {"top_p": 0.999},
        {"min_p": 0.05},
        {"min_p": 0.3, "top_k": 40, "top_p": 0.8, "temperature": 1.5},
    ],
    ids=str,
)
def test_the_filtered_distribution_is_that_of_transformers(size: int, spread: float, options: dict[str, float]) -> None:
    """A flat, a usual and a peaked distribution: the short cuts (group maxima, floor, buckets) must all be exact."""
    scores = row(size, spread)
    got, expected = dense(run(scores, **options), size), reference(scores, **options)  # type: ignore[arg-type]
    floor = 1e-30  # less is nothing: single precision ends near it
    assert np.flatnonzero(got > floor).tolist() == np.flatnonzero(expected > floor).tolist()
    np.testing.assert_allclose(got, expected, rtol=5e-5, atol=floor)


def test_ties_with_the_kth_score_are_all_kept() -> None:
    scores = np.array([1, 3, 2, 2, 2, 0], np.float32)
    found = run(scores, top_k=2)
    assert found.ids_N is not None and found.ids_N.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("size", [10, 30_000])
def test_ties_at_the_border_of_top_p_do_not_let_everything_in(size: int) -> None:
    """Logits of a bf16 model come in few distinct values: keeping all ties of a flat row made top_p do nothing."""
    found = run(np.zeros(size, np.float32), top_p=0.3)
    expected = np.flatnonzero(reference(np.zeros(size, np.float32), top_p=0.3))
    assert found.ids_N is not None
    assert abs(found.ids_N.size - expected.size) <= 1  # the sum of a tenth is not exact in either
    assert found.ids_N[-1] == size - 1


@pytest.mark.parametrize(
    ("options", "count"),
    [({"top_k": 10_000}, 300), ({"top_k": 300}, 300), ({"top_p": 1e-9}, 1), ({"top_p": 0.0}, 1), ({"min_p": 1.0}, 1)],
    ids=str,
)
def test_limits_beyond_the_vocabulary_keep_all_and_tiny_ones_keep_one(options: dict[str, float], count: int) -> None:
    assert np.count_nonzero(dense(run(row(300, 1.0), **options), 300)) == count


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e30])
def test_extreme_temperatures_neither_overflow_nor_lose_the_likeliest(temperature: float) -> None:
    scores = row(300, 3e37)
    probabilities = dense(run(scores, temperature=temperature), 300)
    assert np.isfinite(probabilities).all() and probabilities.argmax() == scores.argmax()


def test_masked_ids_are_never_drawn() -> None:
    scores = np.full(5_000, -np.inf, np.float32)
    scores[[17, 4_321]] = 0.5
    for options in ({}, {"top_p": 0.99}, {"top_k": 100}, {"min_p": 0.01}, {"temperature": 1e30}):
        found = run(scores, **options)
        assert {found.draw(uniform) for uniform in (0.0, 0.25, 0.75, 1 - 2**-53)} == {17, 4_321}


@pytest.mark.parametrize("size", [1, 5, 512, 513, 4_000, 32_000])
def test_draw_inverts_the_cumulative_distribution(size: int) -> None:
    weights = np.exp(row(size, 2.0))
    weights[size // 2 :: 3] = 0.0
    weights[0] = 1.0
    ends = np.cumsum(weights, dtype=np.float64)
    for uniform in np.random.default_rng(1).random(200):
        index = draw_index(weights, float(uniform))
        assert weights[index] > 0
        before = ends[index - 1] if index else 0.0
        assert before * (1 - 1e-12) <= uniform * ends[-1] <= ends[index] * (1 + 1e-12)


@pytest.mark.parametrize("size", [3, 2_000])
def test_the_last_number_below_one_falls_on_an_id_that_weighs_something(size: int) -> None:
    """Rounding puts the target at or behind the total; the trailing ids here weigh nothing."""
    weights = np.zeros(size, np.float32)
    weights[: size // 2] = 0.1
    assert draw_index(weights, 1 - 2**-53) < size // 2
