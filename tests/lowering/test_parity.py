"""Every lowering against transformers, in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

FP32_TOLERANCE = 1e-4


def reference_logits(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].numpy()


def test_logits_equal_transformers_over_a_chunked_prompt(workshop, random_ids, shape, lowering):
    """Rotary angles restarted at every chunk, and the last layer's shortcut took the wrong rows."""
    driver, ids = workshop.driver(shape, lowering), random_ids(150, 1)
    expected = reference_logits(workshop.reference(shape), ids)
    assert expected.std() > 0.3, "a model without contrast proves nothing"
    position = 0
    for length in (1, 31, 40, 33, 1, 1, 43):
        logits = driver.step({"a": ids[position : position + length]})["a"]
        position += length
        assert np.abs(logits - expected[position - 1]).max() <= FP32_TOLERANCE


def test_greedy_ids_equal_transformers_over_64_tokens(workshop, random_ids, shape, lowering):
    """Decoding crosses two block borders here."""
    driver, prompt = workshop.driver(shape, lowering), random_ids(21, 2)
    model = workshop.reference(shape)
    with torch.inference_mode():
        whole = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    expected = whole[0, len(prompt) :].tolist()
    ids = [int(driver.step({"a": prompt})["a"].argmax())]
    while len(ids) < 64:
        ids.append(int(driver.step({"a": ids[-1:]})["a"].argmax()))
    assert ids == expected


def test_mixed_batches_shared_blocks_and_forks_equal_running_alone(workshop, random_ids, shape, lowering):
    """Prompt chunks beside decode tokens, a shared prefix, a copied block: each sequence as if it were alone."""
    driver, model = workshop.driver(shape, lowering), workshop.reference(shape)

    def check(new, samples=None):
        for name, logits in driver.step(new, samples).items():
            expected = reference_logits(model, driver.tokens[name])[-1]
            assert np.abs(logits - expected).max() <= FP32_TOLERANCE, name

    check({"a": random_ids(40, 3), "b": random_ids(100, 4)})
    check({"a": random_ids(30, 5), "b": [7], "c": random_ids(33, 6)}, {"b"})
    check({"a": random_ids(5, 7), "c": random_ids(6, 8)}, set())
    check({"c": [9], "a": [8], "b": [7]})
    driver.share("b", "d", 2)
    check({"d": random_ids(10, 9), "b": [11]})
    driver.fork("a", "e")
    check({"a": [12], "e": [13]})
    check({"e": [14], "a": [15], "b": [16], "c": [17], "d": [18]})


@pytest.mark.parametrize("shape", ["gqa"])
def test_a_step_that_samples_nothing_returns_no_rows(workshop, random_ids, shape, lowering):
    """Steps of prompt chunks only have no logits; the rows computed before must not show through."""
    driver = workshop.driver(shape, lowering)
    driver.step({"a": random_ids(10)})
    assert driver.step({"b": random_ids(20)}, set()) == {}
