"""bf16, int8 and the caches: each against what its format allows, and the lowerings against each other."""

from __future__ import annotations

import copy

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


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("group_size", [0, 32, 64])
def test_integers_equal_their_own_dequantised_weights(workshop, random_ids, dtype, group_size):
    """Scales of one group applied to the next gave plausible but wrong logits."""
    exact = logits_of(
        workshop.driver("quantisable", "openvino", dtype, "native", group_size=group_size, exact=True), random_ids
    )
    reference = logits_of(workshop.driver("quantisable", "torch", dtype, "fp32", group_size=group_size), random_ids)
    assert np.abs(exact - reference).max() <= 1e-4


def fake_int(limit, group_size, round_scale):
    """A function that rounds a matrix to integers in groups and back."""

    def rounded(matrix):
        grouped = matrix.view(matrix.shape[0], -1, group_size)
        scale = grouped.abs().amax(2, keepdim=True) / limit
        scale = scale.bfloat16().float() if round_scale else scale
        return (torch.round(grouped / scale).clamp(-limit, limit) * scale).view_as(matrix)

    return rounded


def fake_fp8(matrix, scale=None):
    """Rounds each row to e4m3 by its own scale, or all to that given, and back."""
    scale = matrix.abs().amax(1, keepdim=True) / 448 if scale is None else scale
    return (matrix / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def fake_int8_activations(scale):
    return lambda x: torch.round(x / scale).clamp(-128, 127) * scale


INPUT_SCALE = 0.03125
REFERENCES = {
    "int8": ("int8", 32, fake_int(127, 32, False), None, False),
    "int8 w8a8": ("int8", 32, fake_int(127, 32, False), fake_int8_activations(INPUT_SCALE), True),
    "int4": ("int4", 32, fake_int(7, 32, True), None, False),
    "fp8": ("fp8", 0, fake_fp8, fake_fp8, False),
    "fp8 static": ("fp8", 0, fake_fp8, lambda x: fake_fp8(x, torch.tensor(INPUT_SCALE)), True),
}


@pytest.mark.parametrize("kind", REFERENCES)
def test_the_torch_reference_equals_transformers_with_rounded_numbers(workshop, random_ids, kind):
    """Both lowerings could share a mistake; transformers with the same rounded weights and inputs cannot."""
    dtype, group_size, of_weights, of_inputs, static = REFERENCES[kind]
    model = copy.deepcopy(workshop.reference("quantisable"))
    scale = INPUT_SCALE if static else None
    driver = workshop.driver("quantisable", "torch", dtype, "fp32", group_size=group_size, input_scale=scale)
    with torch.no_grad():
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            parameter = model.get_parameter(name)
            parameter.copy_(parameter.bfloat16().float())
        if dtype == "int8":
            model.lm_head.weight.copy_(of_weights(workshop.reference("quantisable").lm_head.weight))
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.copy_(of_weights(module.weight))
                if of_inputs is not None:
                    module.register_forward_pre_hook(lambda _, inputs: (of_inputs(inputs[0][0])[None],))
    ids = random_ids(50, 3)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0, -1].numpy()
    found = driver.step({"a": ids})["a"]
    # a last bit may decide which way an activation is rounded, and the next layers carry that on
    assert relative_error(found, expected) <= (0.06 if of_inputs else 1e-5)


@pytest.mark.parametrize(("dtype", "group_size", "limit"), [("fp16", 0, 0.003), ("fp8", 0, 0.4), ("int4", 32, 0.8)])
def test_the_torch_reference_stays_close_to_float32(workshop, random_ids, dtype, group_size, limit):
    """A format that is applied twice, or to the wrong operand, shows as a much larger error."""
    expected = logits_of(workshop.driver("quantisable", "torch"), random_ids)
    found = logits_of(workshop.driver("quantisable", "torch", dtype, "native", group_size=group_size), random_ids)
    assert limit / 100 < relative_error(found, expected) < limit


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "group_size", "limit"),
    [
        ("bf16", "native", 0, 0.03),
        ("bf16", "u8", 0, 0.05),
        ("fp32", "u8", 0, 0.03),
        ("int8", "native", 0, 0.1),
        ("int8", "u8", 64, 0.1),
        ("int4", "native", 64, 0.8),
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
