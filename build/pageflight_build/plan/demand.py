"""What a plan is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from pageflight.core.config import KVConfig
from pageflight.core.errors import ConfigError
from pageflight.models.config import DecoderConfig
from pageflight.quant.forms import DTYPES, check_group_size, default_group_size

BLOCK_SIZE = 32  # of every lowering
KV_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "u8": 1}
U8_RANGE_BYTES = 8
"""Scale and zero, float32, that u8 stores beside the numbers that they are for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is to be served: `concurrency` sequences of `context` tokens at once, in these precisions.

    `max_num_seqs` and `max_num_tokens` bound a step, as in the scheduler's configuration.
    """

    dtype: str = "bf16"
    kv_dtype: str = "bf16"
    group_size: int = 0
    context: int
    concurrency: int = 1
    max_num_seqs: int = 256
    max_num_tokens: int = 256
    gpu_memory_utilization: float = 0.9

    def __post_init__(self) -> None:
        for name in ("context", "concurrency", "max_num_seqs", "max_num_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.concurrency > self.max_num_seqs:
            raise ConfigError(
                f"concurrency={self.concurrency}: max_num_seqs={self.max_num_seqs} sequences run at once; raise it too"
            )
        check_dtypes(self.dtype, self.kv_dtype)
        KVConfig(gpu_memory_utilization=self.gpu_memory_utilization)

    @property
    def blocks_per_sequence(self) -> int:
        """The last token of a sequence is never fed back, so its K/V is never stored."""
        return -(-max(1, self.context - 1) // BLOCK_SIZE)


def check_dtypes(dtype: str, kv_dtype: str) -> None:
    """Raises ConfigError for a precision that is not known."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: supported are {', '.join(DTYPES)}")
    if kv_dtype not in KV_BYTES:
        raise ConfigError(f"kv_dtype={kv_dtype!r}: supported are {', '.join(KV_BYTES)}")


def default_kv_dtype(dtype: str) -> str:
    """The type of the activations."""
    return dtype if dtype in ("fp32", "fp16") else "bf16"


def resolved_group_size(config: DecoderConfig, dtype: str, group_size: int) -> int:
    """Inputs per scale as a build would choose them. Raises ConfigError where `dtype` has no groups."""
    check_group_size(dtype, group_size)
    return group_size or default_group_size(config, dtype)


def check_context(config: DecoderConfig, context: int) -> int:
    """`context`, or the model's own for 0. Raises ConfigError beyond what the model was made for."""
    if context > config.max_positions:
        raise ConfigError(f"context={context}: the model was made for {config.max_positions} positions")
    return context or config.max_positions
