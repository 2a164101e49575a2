"""Configuration: frozen, keyword-only; resolving returns a new one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from pageflight.core.errors import ConfigError
from pageflight.core.tenants import Tenants

SchedulingPolicy = Literal["fcfs", "priority", "fair"]
KVAdmission = Literal["forecast", "optimistic", "reserve"]
SessionAffinity = Literal["none", "prefix", "correlation"]
LauncherName = Literal["local", "ray", "external"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KVConfig:
    """The paged cache. `num_blocks` 0 means: compute it from `memory_bytes`, or from free memory when that is 0.

    `host_memory_bytes` is the size of its second level, in host memory (0: none); `num_host_blocks` what that holds,
    and `host_copy_s` the seconds of copying one block there or back, are resolved when the engine is loaded. On a GPU
    weights, one pass and the blocks together take `gpu_memory_utilization` of its memory.
    """

    block_size: int = 32
    num_blocks: int = 0
    memory_bytes: int = 0
    prefix_cache: bool = True
    host_memory_bytes: int = 0
    num_host_blocks: int = 0
    host_copy_s: float = 0.0
    gpu_memory_utilization: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization={self.gpu_memory_utilization}: must be above 0 and at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of a step and of the queue.

    `max_num_tokens` is the token budget of a step (prompt chunks and decode tokens together); `max_num_seqs` bounds the
    sequences that hold a row; `max_queue_size` the requests that wait for one, `max_queue_tokens` their prompt tokens
    (0: no limit). `token_tile` is the engine's own: it computes the tokens of a step in tiles of so many, and one
    hardly used costs almost as much as a full one.

    `scheduling_policy`: `fcfs` serves by arrival; `priority` by priority, where every `ageing_s` seconds of waiting
    are worth one level (0: none ever); `fair` shares out by the weights of `tenants`, and by priority within one.
    Quotas of `tenants` hold under every policy. `kv_admission`: `reserve` starts a sequence only if it can reach its
    full length whatever the others do; `optimistic` as soon as its prompt fits beside `kv_watermark` of the blocks;
    `forecast` if the lengths of recent answers let expect, too, that all that run will fit as they grow.
    `target_inter_token_ms` is the time that a step may take while sequences decode, held by smaller prompt chunks
    (0: chunks take the whole budget).

    `deterministic`: what a sequence gets must not depend on company, chunking or interruptions; a step may then exceed
    its budget by less than a block. `replay_rows` is the engine's own: output tokens of one sequence that such a step
    may compute again.
    """

    max_num_tokens: int = 256
    max_num_seqs: int = 256
    max_model_len: int = 2048
    max_queue_size: int = 10_000
    token_tile: int = 1
    deterministic: bool = False
    replay_rows: int = 1
    scheduling_policy: SchedulingPolicy = "priority"
    ageing_s: float = 60.0
    max_queue_tokens: int = 0
    kv_admission: KVAdmission = "forecast"
    kv_watermark: float = 0.01
    target_inter_token_ms: float = 0.0
    tenants: Tenants = field(default_factory=Tenants)

    def __post_init__(self) -> None:
        for name in ("max_num_tokens", "max_num_seqs", "max_model_len", "max_queue_size", "token_tile", "replay_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("ageing_s", "max_queue_tokens", "target_inter_token_ms"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 0")
        if not 0 <= self.kv_watermark < 1:
            raise ConfigError(f"kv_watermark={self.kv_watermark}: must be from 0 and below 1")
        for name, choices in (("scheduling_policy", SchedulingPolicy), ("kv_admission", KVAdmission)):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(f"{name}={getattr(self, name)!r}: supported are {', '.join(get_args(choices))}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything a core needs besides the engine directory."""

    kv: KVConfig = KVConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    tensor_parallel: int = 1
    """Ranks that compute each layer together; it must divide the attention heads."""
    pipeline_parallel: int = 1
    """Stages of consecutive layers, each with `tensor_parallel` ranks; at most as many as there are layers."""
    launcher: LauncherName = "local"
    """Who starts the other ranks: this machine's core, Ray, or whoever does and has them dial in."""
    num_nodes: int = 1
    """Machines that share the ranks alike: the first ranks are on the core's machine, the next ones on the second."""
    rank_port: int = 29600
    """Of the core's machine, where ranks of launcher `external` dial in."""
    rank_wait_s: float = 300.0
    """How long a core waits for ranks that others start."""
    ray_address: str = "auto"
    """Of the Ray cluster that launcher `ray` joins, HOST:PORT; "auto": what RAY_ADDRESS says, else the one here."""
    num_threads: int = 0
    """Compute threads of this instance; 0 means all cores that the process may use."""
    seed: int = 0
    """Base of the seeds of requests that bring none."""
