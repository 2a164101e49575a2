"""The bytes that one card of a layout holds and reads: weights as the engine stores them, K/V, one pass.

Shapes: T tokens of a pass, R rows of logits, H hidden, F features of a fused q, k and v, Q query features, I
intermediate, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd, prod

from pageflight.models.config import DecoderConfig
from pageflight.models.stages import Stage, cut_stages
from pageflight.models.weights import EMBED, FINAL_NORM, HEAD, LayerNames
from pageflight.quant.forms import QUANTISED_FORMS, WeightForm, weight_forms
from pageflight.quant.sharding import input_unit
from pageflight_build.plan.demand import BLOCK_SIZE, KV_BYTES, U8_RANGE_BYTES, Demand
from pageflight_build.plan.layouts import Layout, rank_config

_STORED_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1}
_SMALLEST_GROUP = {"I8": 16, "I4": 32}
"""Of inputs that the GPU's kernels take; smaller ones are widened when they are loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One card of a stage. `read_bytes` of the weights are read by every step; the embedding is looked up in.

    `num_matrix_parameters` multiply every token, `num_head_parameters` every token that samples.
    """

    weight_bytes: int
    read_bytes: int
    table_bytes: int
    pass_bytes: int
    rows_bytes: int
    block_bytes: int
    num_matrix_parameters: int
    num_head_parameters: int
    num_attention_features: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """What of the target decides how weights lie in memory.

    A GPU has everything but quantised matrices in the type of its activations. OpenVINO has what the file has;
    `keeps_both_forms`: of float32 matrices it packs the MLP's last differently for one token and for many, and keeps
    both (measured: docs/planning.md).
    """

    is_gpu: bool = True
    keeps_both_forms: bool = False


def stored_bytes(config: DecoderConfig, dtype: str, group_size: int) -> int:
    """All weights in the file of an engine, without its header."""
    layer, table, norm, head = _parts(config, dtype, group_size, Holder(is_gpu=False), 1)
    return config.num_layers * layer + table + norm + head


def kv_bytes_per_block(config: DecoderConfig, kv_dtype: str, num_layers: int, holder: Holder) -> int:
    """K and V of `num_layers` layers. u8 has a range by token and head; OpenVINO's keys have one by channel instead."""
    numbers = 2 * BLOCK_SIZE * config.head_dim * KV_BYTES[kv_dtype]
    ranges = 0
    if kv_dtype == "u8":
        ranges = U8_RANGE_BYTES * (BLOCK_SIZE + (BLOCK_SIZE if holder.is_gpu else config.head_dim))
    return num_layers * config.num_kv_heads * (numbers + ranges)


def activation_bytes(dtype: str) -> int:
    return 4 if dtype == "fp32" else 2


def pass_bytes(config: DecoderConfig, num_tokens: int, num_rows: int, num_layers: int, element_bytes: int) -> int:
    """Most memory that the values of a pass take at once, by the order of the definition's operations.

    A value lives until the next layer has computed the one that takes its name: beside the residual x and the
    normalised h, [T, H], there are qkv [T, F] and the attended heads [T, Q]. Most is there when a layer multiplies into
    gate and up [T, 2I] while the layer before still has its own, when it multiplies their product [T, I] down, or when
    it multiplies into qkv; or at the head, where rows that do not sample have gone.
    """
    c = config
    fused = c.q_size + 2 * c.kv_size
    kept = 2 * c.hidden_size + fused + c.q_size
    num_full = num_layers - 1  # the last layer's MLP has the rows that sample only
    gate_up, gated = 2 * c.intermediate_size, c.intermediate_size
    moments = [kept]
    if num_full >= 1:
        moments += [kept + gate_up + gated + c.hidden_size, kept + gate_up + fused]
    if num_full >= 2:
        moments.append(kept + 2 * gate_up)
    layers = num_tokens * max(moments)
    head = num_tokens * fused + num_rows * (3 * c.hidden_size + c.q_size + gate_up + c.vocab_size)
    return element_bytes * max(layers, head)


def rows_bytes(num_rows: int, num_positions: int, num_scores: int) -> int:
    """Most that the rows of a GPU's runner take: tokens and block tables, and, where they are sampled, adjusted scores
    and counts of `num_scores` ids each. Four bytes for everything."""
    return 4 * num_rows * (num_positions + -(-num_positions // BLOCK_SIZE) + 2 * num_scores)


def shares_of(config: DecoderConfig, demand: Demand, layout: Layout, holder: Holder) -> tuple[Share, ...]:
    """The fullest card of every stage."""
    rank = rank_config(config, layout.tensor_parallel, input_unit(demand.dtype, demand.group_size))
    parts = _parts(rank, demand.dtype, demand.group_size, holder, layout.tensor_parallel)
    layer, table, norm, head = parts
    stages = cut_stages(
        [layer] * config.num_layers, first_bytes=table, last_bytes=norm + (head or table), num_stages=layout.pipeline
    )
    return tuple(_share(config, rank, demand, stage, parts, layout, holder) for stage in stages)


def _share(
    config: DecoderConfig,
    rank: DecoderConfig,
    demand: Demand,
    stage: Stage,
    parts: tuple[int, ...],
    layout: Layout,
    holder: Holder,
) -> Share:
    layer, table, norm, head = parts
    holds_table = stage.is_first or (stage.is_last and not head)  # a tied head reads the embedding
    num_layers = stage.end - stage.begin
    read = num_layers * layer + stage.is_last * (norm + (head or table))
    layers = replace(rank, num_layers=num_layers, vocab_size=0)
    rows = demand.max_num_seqs if stage.is_last else 0
    return Share(
        weight_bytes=num_layers * layer + holds_table * table + stage.is_last * (norm + head),
        read_bytes=read,
        table_bytes=2 * 4 * demand.context * config.head_dim,  # cosines and sines, float32
        pass_bytes=pass_bytes(
            rank,
            max(demand.max_num_tokens, demand.max_num_seqs),
            rows,
            num_layers + (not stage.is_last),  # every layer but the model's last one has all rows
            activation_bytes(demand.dtype),
        ),
        rows_bytes=rows_bytes(demand.max_num_seqs, demand.context, config.vocab_size if stage.is_last else 0),
        block_bytes=kv_bytes_per_block(rank, demand.kv_dtype, num_layers, holder),
        num_matrix_parameters=layers.num_parameters,
        num_head_parameters=stage.is_last * -(-config.vocab_size // layout.tensor_parallel) * config.hidden_size,
        num_attention_features=num_layers * rank.q_size,
    )


def _parts(config: DecoderConfig, dtype: str, group_size: int, holder: Holder, size: int) -> tuple[int, int, int, int]:
    """Bytes of one layer, the embedding, the final norm and the head (0: it is the embedding), of one of `size`."""
    if group_size and size > 1:
        group_size = gcd(group_size, config.q_size)  # where a rank's heads end within a group, it has smaller ones
    forms = weight_forms(replace(config, num_layers=1), dtype, group_size)
    rows = -(-config.vocab_size // size)
    sizes = {}
    for name, form in forms.items():
        if name in (EMBED, HEAD):
            scales = None if form.scales is None else (rows, form.scales[1])
            form = WeightForm(form.dtype, (rows, form.shape[1]), scales)
        again = holder.keeps_both_forms and name == LayerNames.of(0).down
        sizes[name] = _held_bytes(name, form, dtype, holder) + again * 4 * prod(form.shape)
    outside = (EMBED, FINAL_NORM, HEAD)
    layer = sum(num_bytes for name, num_bytes in sizes.items() if name not in outside)
    return layer, sizes[EMBED], sizes[FINAL_NORM], sizes.get(HEAD, 0)


def _held_bytes(name: str, form: WeightForm, dtype: str, holder: Holder) -> int:
    if holder.is_gpu and (form.dtype not in QUANTISED_FORMS or _is_widened(form)):
        return prod(form.shape) * activation_bytes(dtype)
    return sum(prod(shape) * _STORED_BYTES[stored] for stored, shape in form.tensors(name).values())


def _is_widened(form: WeightForm) -> bool:
    if form.scales is None or form.dtype not in _SMALLEST_GROUP:
        return False
    smallest, groups = _SMALLEST_GROUP[form.dtype], form.scales[1]
    return (groups > 1 and form.shape[1] // groups % smallest != 0) or (form.dtype == "I4" and form.shape[1] % 32 != 0)
