"""bf16, int8 and the caches: each against what its format allows, and the lowerings against each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pageflight.lowering.openvino_lowering import dynamic_group
from pageflight.models.config import DecoderConfig

STEPS = ({"a": 70}, {"a": 20, "b": 45}, {"a": 1, "b": 1}, {"b": 1, "a": 1, "c": 33}, {"c": 1, "b": 1, "a": 1})


def logits_of(driver, random_ids):
    """Logits [rows, V] of a run with chunks, decoding and mixed steps."""
    rows = [driver.step({n: random_ids(k, 7 * i + k) for n, k in step.items()}) for i, step in enumerate(STEPS)]
    return np.concatenate([np.stack(list(step.values())) for step in rows])


def relative_error(found, expected):
    """Root mean square difference in units of the logits' deviation."""
    return float(np.sqrt(np.mean((found - expected) ** 2)) / expected.std())


@pytest.mark.parametrize("group_size", [0, 32, 64])
def test_int8_equals_its_own_dequantised_weights(workshop, random_ids, group_size):
    """Scales of one group applied to the next gave plausible but wrong logits."""
    exact = logits_of(
        workshop.driver("quantisable", "openvino", "int8", "native", group_size=group_size, exact=True), random_ids
    )
    reference = logits_of(workshop.driver("quantisable", "torch", "int8", "fp32", group_size=group_size), random_ids)
    assert np.abs(exact - reference).max() <= 1e-4


def test_the_torch_reference_of_int8_equals_transformers_with_dequantised_weights(workshop, random_ids):
    """Both lowerings could share a mistake; transformers with the same rounded weights cannot."""
    driver, model = (
        workshop.driver("quantisable", "torch", "int8", "fp32", group_size=32),
        workshop.reference("quantisable"),
    )
    original = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.bfloat16().float())
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2 and "embed" not in name:
                    grouped = parameter.view(parameter.shape[0], -1, 32)
                    scale = grouped.abs().amax(2, keepdim=True) / 127
                    parameter.copy_((torch.round(grouped / scale) * scale).view_as(parameter))
        ids = random_ids(50, 3)
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0, -1].numpy()
    finally:
        model.load_state_dict(original)
    assert np.abs(driver.step({"a": ids})["a"] - expected).max() <= 1e-4


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "group_size", "limit"),
    [
        ("bf16", "native", 0, 0.03),
        ("bf16", "u8", 0, 0.05),
        ("fp32", "u8", 0, 0.03),
        ("int8", "native", 0, 0.1),
        ("int8", "u8", 64, 0.1),
    ],
)
def test_engines_as_built_stay_close_to_float32(workshop, random_ids, dtype, kv_dtype, group_size, limit):
    """A format that is applied twice, or to the wrong operand, shows as a much larger error."""
    expected = logits_of(workshop.driver("quantisable", "torch"), random_ids)
    found = logits_of(workshop.driver("quantisable", "openvino", dtype, kv_dtype, group_size=group_size), random_ids)
    error = relative_error(found, expected)
    assert 1e-5 < error < limit, "an error of zero means the format was not used"


@pytest.mark.parametrize("kv_dtype", ["native", "u8"])
def test_reduced_formats_agree_between_lowerings(workshop, random_ids, kv_dtype):
    """The same format in two programs differs by rounding only."""
    found = logits_of(workshop.driver("quantisable", "openvino", "bf16", kv_dtype), random_ids)
    expected = logits_of(workshop.driver("quantisable", "torch", "bf16", kv_dtype), random_ids)
    assert relative_error(found, expected) < 0.05


@pytest.mark.parametrize("kv_dtype", ["native", "u8"])
def test_a_forked_block_in_a_reduced_cache_equals_its_source(workshop, random_ids, kv_dtype):
    """Scales live inside the block; a copy without them decoded noise."""
    driver = workshop.driver("quantisable", "openvino", "bf16", kv_dtype)
    driver.step({"a": random_ids(45, 1)})
    driver.fork("a", "b")
    logits = driver.step({"a": [9], "b": [9]})
    np.testing.assert_allclose(logits["a"], logits["b"], atol=1e-2)


@pytest.mark.parametrize(
    ("sizes", "weight_group", "expected"),
    [
        ((4096, 14336), 0, 256),
        ((1024, 2816), 128, 128),
        ((512, 1408), 0, 128),
        ((96, 160), 0, 32),
        ((75, 99), 0, 0),
        ((512, 1024), 32, 32),
    ],
)
def test_dynamic_groups_divide_every_input(sizes, weight_group, expected):
    """A group that divides no input switches the fast kernel off in silence."""
    hidden, inner = sizes
    config = DecoderConfig(
        family="llama", vocab_size=8, hidden_size=hidden, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=hidden,
        intermediate_size=inner, max_positions=8, rms_norm_eps=1e-5,
    )  # fmt: skip
    assert dynamic_group(config, weight_group) == expected
