"""Rotary tables against transformers' own frequencies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pageflight.models.config import RopeConfig
from pageflight.models.rope import inverse_frequencies

CASES: list[tuple[RopeConfig, dict[str, Any]]] = [
    (RopeConfig(theta=5e5, scaling="linear", factor=4.0), {"rope_type": "linear", "factor": 4.0}),
    (
        RopeConfig(theta=5e5, scaling="llama3", factor=8.0, original_max_positions=8192),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
]


@pytest.mark.parametrize(("rope", "parameters"), CASES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_frequencies_equal_transformers(rope: RopeConfig, parameters: dict[str, Any], head_dim: int) -> None:
    """The blend of llama3 scaling was taken from wavelengths instead of turns."""
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": 5e5, **parameters},
    )
    expected, scale = ROPE_INIT_FUNCTIONS[rope.scaling](config, "cpu")
    assert scale == 1.0
    np.testing.assert_allclose(inverse_frequencies(rope, head_dim), expected.numpy(), rtol=1e-6)
