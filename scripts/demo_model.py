"""A small Llama in plain torch, for training: the same mathematics and weight names as transformers' Llama."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# B windows, T positions, D hidden, H heads, K key/value heads, E head_dim, V vocabulary


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.head_dim = int(config["head_dim"])
        hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=False)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        batch, length, _ = x_BTD.shape
        q, k, v = (
            proj(x_BTD).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(
            rotate(q, cos_TE, sin_TE), rotate(k, cos_TE, sin_TE), v, is_causal=True, enable_gqa=True
        )
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))
        return out


class GatedMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return out


class Layer(nn.Module):
    """Attention and MLP, each with its norm and residual."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = GatedMLP(config)
        self.input_layernorm = nn.RMSNorm(config["hidden_size"], eps=config["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(config["hidden_size"], eps=config["rms_norm_eps"])

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_TE, sin_TE)
        out: Tensor = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        return out


class Decoder(nn.Module):
    """The stack between token ids and the last norm."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.RMSNorm(config["hidden_size"], eps=config["rms_norm_eps"])


class DemoLlama(nn.Module):
    """A Llama with tied embeddings; `state_dict()` carries transformers' names."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.head_dim = int(config["head_dim"])
        self.rope_theta = float(config["rope_theta"])

    def init_weights(self, generator: torch.Generator) -> None:
        """Normal with standard deviation 0.02, the residual projections smaller by the square root of their count."""
        depth_scale = (2 * len(self.model.layers)) ** -0.5
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = 0.02 * (depth_scale if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
                nn.init.normal_(p, std=std, generator=generator)

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """[B, T] token ids → [B, T, D] after the last norm."""
        cos_TE, sin_TE = self.rope_rows(ids_BT.shape[1])
        x_BTD = self.model.embed_tokens(ids_BT)
        for layer in self.model.layers:
            x_BTD = layer(x_BTD, cos_TE, sin_TE)
        out: Tensor = self.model.norm(x_BTD)
        return out

    def forward(self, ids_BT: Tensor) -> Tensor:
        """[B, T] token ids → [B, T, V] logits."""
        return F.linear(self.hidden(ids_BT), self.model.embed_tokens.weight)

    def rope_rows(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0 … length-1, each [T, E], the two halves of E alike."""
        inverse = self.rope_theta ** (-torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim)
        angles_TE = torch.outer(torch.arange(length, dtype=torch.float32), inverse).repeat(1, 2)
        return angles_TE.cos(), angles_TE.sin()


def rotate(x_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotary embedding, halves convention (as transformers' Llama)."""
    first, second = x_BHTE.chunk(2, dim=-1)
    return x_BHTE * cos_TE.to(x_BHTE.dtype) + torch.cat((-second, first), dim=-1) * sin_TE.to(x_BHTE.dtype)
