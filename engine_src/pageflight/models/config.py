"""DecoderConfig: what the decoder definition and the lowerings need to know of a model, in one frozen record."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from pageflight.core.errors import ManifestMismatch


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al., RoFormer, 2021) and how its frequencies are stretched.

    `scaling` is default, linear or llama3. Linear divides every frequency by `factor` (Chen et al., Position
    Interpolation, 2023); llama3 divides those below `low_freq_factor` turns per `original_max_positions`, keeps those
    above `high_freq_factor` and blends between (The Llama 3 Herd of Models, 2024).
    """

    theta: float = 10000.0
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Shapes and constants of a decoder. Sizes count features; ids are of the checkpoint's tokenizer."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    rms_norm_eps: float
    rope: RopeConfig = RopeConfig()
    tied_head: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    checkpoint_dtype: str = ""  # as the checkpoint states it; informs the choice of a build's dtype
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Weights of all matrices (biases and norms, a rounding error of it, are left out)."""
        attention = (self.q_size + 2 * self.kv_size) * self.hidden_size + self.hidden_size * self.q_size
        layer = attention + 3 * self.intermediate_size * self.hidden_size
        tables = self.vocab_size * self.hidden_size * (1 if self.tied_head else 2)
        return self.num_layers * layer + tables

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` gives an equal config back."""
        data = asdict(self)
        data["eos_token_ids"] = list(self.eos_token_ids)
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DecoderConfig:
        """The config that `to_json` wrote. Raises ManifestMismatch for missing or unknown entries."""
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise ManifestMismatch(f"model: unknown entries {sorted(unknown)}; built by another version, build again")
        values = dict(data)
        try:
            values["rope"] = RopeConfig(**data["rope"])
            values["eos_token_ids"] = tuple(data.get("eos_token_ids", ()))
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise ManifestMismatch(f"model: {error}; build the engine again") from None
