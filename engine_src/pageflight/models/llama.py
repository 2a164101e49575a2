"""The Llama family: how its `config.json` and tensor names map onto the definition."""

from __future__ import annotations

from pageflight.models.config import DecoderConfig
from pageflight.models.hf_entries import Entries, read_rope
from pageflight.models.weights import EMBED, FINAL_NORM, HEAD, LayerNames, Role, Source, WeightSpec, bias_name

# Entries that would change the result if they were ignored; a value outside the set is refused.
_ONLY: dict[str, tuple[object, str]] = {
    "sliding_window": (None, "sliding-window attention is not supported; supported is null"),
    "attn_logit_softcapping": (None, "supported is null"),
    "final_logit_softcapping": (None, "supported is null"),
    "num_local_experts": (None, "mixture-of-experts layers are not supported"),
    "num_experts": (None, "mixture-of-experts layers are not supported"),
}


def read_llama(entries: Entries) -> DecoderConfig:
    """The decoder that a Llama `config.json` describes. Raises CheckpointError naming the entry that does not fit."""
    if entries.data.get("hidden_act", "silu") not in ("silu", "swish"):
        raise entries.refuse("hidden_act", "supported is silu")
    for name, (allowed, why) in _ONLY.items():
        if entries.data.get(name) != allowed:
            raise entries.refuse(name, why)
    hidden_size = entries.integer("hidden_size")
    num_heads = entries.integer("num_attention_heads")
    num_kv_heads = entries.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise entries.refuse("num_key_value_heads", f"must divide num_attention_heads={num_heads}")
    if entries.data.get("head_dim") is None and hidden_size % num_heads:
        raise entries.refuse("num_attention_heads", f"must divide hidden_size={hidden_size} where head_dim is absent")
    head_dim = entries.integer("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise entries.refuse("head_dim", "must be even: rotary embedding turns pairs of features")
    vocab_size = entries.integer("vocab_size")
    max_positions = entries.integer("max_position_embeddings", 2048)
    attention_bias = entries.flag("attention_bias")
    return DecoderConfig(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=entries.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=entries.integer("intermediate_size"),
        max_positions=max_positions,
        rms_norm_eps=entries.number("rms_norm_eps", 1e-6),
        rope=read_rope(entries, max_positions),
        tied_head=entries.flag("tie_word_embeddings"),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=entries.flag("mlp_bias"),
        checkpoint_dtype=str(entries.data.get("dtype") or entries.data.get("torch_dtype") or ""),
        bos_token_id=entries.token_id("bos_token_id", vocab_size),
        eos_token_ids=entries.token_ids("eos_token_id", vocab_size),
        pad_token_id=entries.token_id("pad_token_id", vocab_size),
    )


def llama_weights(config: DecoderConfig) -> tuple[WeightSpec, ...]:
    """Every weight of the definition, in the order the model uses them, with its sources in a Llama checkpoint."""
    c = config
    hidden = c.hidden_size
    vector, linear = Role.VECTOR, Role.LINEAR
    specs = [WeightSpec(EMBED, Role.TABLE, (Source("model.embed_tokens.weight", (c.vocab_size, hidden)),))]

    def add_linear(name: str, sources: tuple[tuple[str, int], ...], columns: int, has_bias: bool) -> None:
        weights = tuple(Source(source + ".weight", (rows, columns)) for source, rows in sources)
        specs.append(WeightSpec(name, linear, weights))
        if has_bias:
            biases = tuple(Source(source + ".bias", (rows,)) for source, rows in sources)
            specs.append(WeightSpec(bias_name(name), vector, biases))

    for layer in range(c.num_layers):
        names, old = LayerNames.of(layer), f"model.layers.{layer}."
        attention, mlp = old + "self_attn.", old + "mlp."
        specs.append(WeightSpec(names.input_norm, vector, (Source(old + "input_layernorm.weight", (hidden,)),)))
        qkv = ((attention + "q_proj", c.q_size), (attention + "k_proj", c.kv_size), (attention + "v_proj", c.kv_size))
        add_linear(names.qkv, qkv, hidden, c.qkv_bias)
        add_linear(names.output, ((attention + "o_proj", hidden),), c.q_size, c.output_bias)
        specs.append(WeightSpec(names.post_norm, vector, (Source(old + "post_attention_layernorm.weight", (hidden,)),)))
        gate_up = ((mlp + "gate_proj", c.intermediate_size), (mlp + "up_proj", c.intermediate_size))
        add_linear(names.gate_up, gate_up, hidden, c.mlp_bias)
        add_linear(names.down, ((mlp + "down_proj", hidden),), c.intermediate_size, c.mlp_bias)
    specs.append(WeightSpec(FINAL_NORM, vector, (Source("model.norm.weight", (hidden,)),)))
    if not c.tied_head:
        specs.append(WeightSpec(HEAD, linear, (Source("lm_head.weight", (c.vocab_size, hidden)),)))
    return tuple(specs)
