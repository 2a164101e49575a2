"""What a build is asked for: frozen, checked once; what depends on machine and model is resolved later."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from pageflight.core.config import (
    EngineConfig,
    KVAdmission,
    KVConfig,
    LauncherName,
    SchedulerConfig,
    SchedulingPolicy,
    SessionAffinity,
)
from pageflight.core.errors import ConfigError
from pageflight_build.instances import parse_instances

ENGINES = ("openvino", "tensorrt", "torch")
FLAVORS = ("rtx", "full")
WEIGHTS = ("input", "constant")
COLLECTIVES = ("between", "inside")
DTYPES = ("fp32", "fp16", "bf16", "fp8", "int8", "int4")
GROUPED_DTYPES = ("int8", "int4")
STEP_TOKENS = {"openvino": 256, "tensorrt": 2048, "torch": 2048}
"""Of a step, where nothing else is asked for: a few hundred keep a CPU busy, and a GPU would wait for its memory."""
KV_DTYPES = ("fp32", "fp16", "bf16", "fp8", "u8")
RESERVED_NAMES = ("ensemble", "preprocessing", "postprocessing")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NO_LIMIT = 2**31 - 1
_BYTES = ("kv_memory", "host_kv_memory")


def _one_of(option: str, value: str, supported: tuple[str, ...]) -> None:
    if value not in supported:
        raise ConfigError(f"{option}={value!r}: supported are {', '.join(supported)}")


def _at_least(option: str, value: int, least: int) -> None:
    if not least <= value <= (2**62 if option in _BYTES else _NO_LIMIT):
        raise ConfigError(f"{option}={value}: must be at least {least}")


def check_name(option: str, name: str) -> None:
    """Raises ConfigError when `name` cannot be a model's name (it becomes a folder and part of a URL)."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise ConfigError(f"{option}={name!r}: use 1 to 128 letters, digits, '.', '_' or '-', first a letter or digit")
    if name in RESERVED_NAMES:
        raise ConfigError(f"{option}={name!r}: a model of the pipeline has that name; choose another")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What shapes the engine: another value here means another conversion.

    `dtype` and `kv_dtype` None are chosen for machine and model; `max_model_len` 0 is the model's own. `group_size` is
    the inputs per scale of integer weights; 0 is one scale per output channel for int8, which is the fastest, and the
    largest of 128, 64 and 32 that fits for int4.

    Of tensorrt only: `flavor`, the package that builds; `compute_capability`, the GPUs to build for, 89 being 8.9, none
    all that it can; `weights`, whether they are inputs of the engines or constants in them; `collectives`, whether
    sums over ranks stand between engines or inside them.
    """

    engine: str = "openvino"
    dtype: str | None = None
    group_size: int = 0
    kv_dtype: str | None = None
    max_model_len: int = 0
    flavor: str = "rtx"
    compute_capability: tuple[int, ...] = ()
    weights: str = "input"
    collectives: str = "between"

    def __post_init__(self) -> None:
        _one_of("engine", self.engine, ENGINES)
        _one_of("flavor", self.flavor, FLAVORS)
        _one_of("weights", self.weights, WEIGHTS)
        _one_of("collectives", self.collectives, COLLECTIVES)
        if self.engine != "tensorrt":
            defaults = {"flavor": "rtx", "compute_capability": (), "weights": "input", "collectives": "between"}
            for name, default in defaults.items():
                if getattr(self, name) != default:
                    raise ConfigError(f"{name}={getattr(self, name)!r}: only engine tensorrt has it, not {self.engine}")
        if self.dtype is not None:
            _one_of("dtype", self.dtype, DTYPES)
        if self.kv_dtype is not None:
            _one_of("kv_dtype", self.kv_dtype, KV_DTYPES)
        _at_least("group_size", self.group_size, 0)
        _at_least("max_model_len", self.max_model_len, 0)
        if self.group_size > 0 and self.dtype not in (None, *GROUPED_DTYPES):
            known = " and ".join(GROUPED_DTYPES)
            raise ConfigError(f"group_size={self.group_size}: only dtypes {known} have groups, dtype is {self.dtype}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """What ends in `config.pbtxt`: another value here rewrites the configuration and keeps the engine.

    `kv_memory` is in bytes, 0 means computed from free memory; `host_kv_memory` too, 0 is no second level of the cache.
    `instances` is text of `parse_instances`; `threads` 0 means all cores shared by the instances. `tensor_parallel` is
    the ranks of each of an instance's `pipeline_parallel` stages, on `nodes` machines, started by `launcher` (see
    `EngineConfig` for these and for `rank_port` and `rank_wait_s`). `tenants` is the absolute path of a tenants file,
    empty for none. `session_affinity` says which requests go to one instance, `reroute_after_s` how long sequences wait
    for their instance's next core before another instance takes them. `response_rate` is what an instance sends per
    second before it joins tokens of a stream, 0 follows the cores. How requests are served: see `SchedulerConfig`.
    """

    kv_memory: int = 0
    host_kv_memory: int = 0
    max_num_seqs: int = 256
    max_num_tokens: int = 256
    max_queue_size: int = 10_000
    max_queue_tokens: int = 0
    scheduling_policy: SchedulingPolicy = "priority"
    ageing_s: float = 60.0
    tenants: str = ""
    kv_admission: KVAdmission = "forecast"
    gpu_memory_utilization: float = 0.9
    kv_watermark: float = 0.01
    target_inter_token_ms: float = 0.0
    hang_limit_s: int = 60
    instances: str = "1"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    session_affinity: SessionAffinity = "none"
    reroute_after_s: float = 10.0
    threads: int = 0
    launcher: LauncherName = "local"
    nodes: int = 1
    rank_port: int = EngineConfig().rank_port
    rank_wait_s: float = EngineConfig().rank_wait_s
    ray_address: str = EngineConfig().ray_address
    engine_name: str = "engine"
    exclude_input_in_output: bool = True
    default_max_tokens: int = 256
    response_rate: int = 0
    prefix_cache: bool = True
    deterministic: bool = False

    def __post_init__(self) -> None:
        counts = ("max_num_seqs", "max_num_tokens", "max_queue_size", "hang_limit_s", "default_max_tokens")
        for name in (*counts, "tensor_parallel", "pipeline_parallel"):
            _at_least(name, getattr(self, name), 1)
        for name in (*_BYTES, "threads", "response_rate"):
            _at_least(name, getattr(self, name), 0)
        self.scheduler(max_model_len=1)  # refuses what cannot work
        KVConfig(gpu_memory_utilization=self.gpu_memory_utilization)
        parse_instances(self.instances)
        _one_of("session_affinity", self.session_affinity, get_args(SessionAffinity))
        if not 0 <= self.reroute_after_s < float("inf"):
            raise ConfigError(f"reroute_after_s={self.reroute_after_s}: must be at least 0")
        check_name("engine_name", self.engine_name)

    def scheduler(self, *, max_model_len: int) -> SchedulerConfig:
        """The scheduler's part of these options, its tenants without what the file says."""
        return SchedulerConfig(
            max_num_tokens=self.max_num_tokens,
            max_num_seqs=self.max_num_seqs,
            max_model_len=max_model_len,
            max_queue_size=self.max_queue_size,
            max_queue_tokens=self.max_queue_tokens,
            scheduling_policy=self.scheduling_policy,
            ageing_s=self.ageing_s,
            kv_admission=self.kv_admission,
            kv_watermark=self.kv_watermark,
            target_inter_token_ms=self.target_inter_token_ms,
            deterministic=self.deterministic,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """One `pageflight build`. `default` makes this model the owner of `ensemble`; the first model is it anyway."""

    checkpoint: Path
    repository: Path
    name: str
    engine: EngineOptions = EngineOptions()
    serving: ServingOptions = ServingOptions()
    default: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        check_name("name", self.name)
        if self.name == self.serving.engine_name:
            raise ConfigError(f"name={self.name!r}: the engine model has that name already; choose another --name")
