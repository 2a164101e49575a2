"""Configuration: frozen, keyword-only; resolving returns a new one."""

from __future__ import annotations

from dataclasses import dataclass

from pageflight.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class KVConfig:
    """The paged cache. `num_blocks` 0 means: compute it from `memory_bytes`, or from free memory when that is 0."""

    block_size: int = 32
    num_blocks: int = 0
    memory_bytes: int = 0
    prefix_cache: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of a step and of the queue.

    `max_num_tokens` is the token budget of a step (prompt chunks and decode tokens together); `max_num_seqs` bounds the
    sequences that hold a row; `max_queue_size` the requests that wait for one. `token_tile` is the engine's own: it
    computes the tokens of a step in tiles of so many, and one hardly used costs almost as much as a full one.
    """

    max_num_tokens: int = 256
    max_num_seqs: int = 256
    max_model_len: int = 2048
    max_queue_size: int = 10_000
    token_tile: int = 1

    def __post_init__(self) -> None:
        for name in ("max_num_tokens", "max_num_seqs", "max_model_len", "max_queue_size", "token_tile"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything a core needs besides the engine directory."""

    kv: KVConfig = KVConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    num_threads: int = 0
    """Compute threads of this instance; 0 means all cores that the process may use."""
    seed: int = 0
    """Base of the seeds of requests that bring none."""
