"""The decoder, written once. A lowering decides what the operations do: compute now, or add nodes to a graph.

Shapes: T packed tokens, L rows of logits, H hidden, V vocabulary; activations are [T, features].
"""

from __future__ import annotations

from typing import TypeVar

from pageflight.models.config import DecoderConfig
from pageflight.models.ops import Ops
from pageflight.models.stages import Stage, whole
from pageflight.models.weights import EMBED, FINAL_NORM, HEAD, LayerNames, bias_name

Value = TypeVar("Value")


def decoder(ops: Ops[Value], config: DecoderConfig, stage: Stage | None = None, x: Value | None = None) -> Value:
    """Logits [L, V] of the packed tokens that `take` picks, in the order of Touvron et al., LLaMA, 2023.

    A `stage` that is not the first gets the hidden state `x` [T, H] of the one before it; one that is not the last
    returns it. `paged_attention` counts layers from the stage's first.
    """
    c, stage = config, stage or whole(config)
    ids, positions, take = ops.inputs()
    if x is None:
        assert stage.is_first, "what the stage before has made"
        x = ops.embed(ids, EMBED)
    rows = ops.rope_rows(positions)
    for layer in range(stage.begin, stage.end):
        w = LayerNames.of(layer)
        h = ops.rms_norm(x, w.input_norm, c.rms_norm_eps)
        qkv = ops.linear(h, w.qkv, bias_name(w.qkv) if c.qkv_bias else None)
        q, k, v = ops.split(qkv, (c.q_size, c.kv_size, c.kv_size))
        q, k = ops.rope(q, rows, c.num_heads), ops.rope(k, rows, c.num_kv_heads)
        attended = ops.paged_attention(layer - stage.begin, q, k, v)
        if layer == stage.num_layers - 1:  # K and V are written: from here on only the rows that sample are wanted
            x, attended = ops.take(x, take), ops.take(attended, take)
        x = ops.add(x, ops.linear(attended, w.output, bias_name(w.output) if c.output_bias else None))
        h = ops.rms_norm(x, w.post_norm, c.rms_norm_eps)
        gated = ops.gated_linear(h, w.gate_up, bias_name(w.gate_up) if c.mlp_bias else None)
        x = ops.add(x, ops.linear(gated, w.down, bias_name(w.down) if c.mlp_bias else None))
    if not stage.is_last:
        return x
    return ops.linear(ops.rms_norm(x, FINAL_NORM, c.rms_norm_eps), HEAD)
