"""The engine model: token ids in, token ids and text out. Its stub process owns the engine core."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast, get_args

import msgspec
import numpy as np

from pageflight.backend import triton
from pageflight.backend.front_model import FrontModel, core_addresses, read_settings
from pageflight.backend.generations import TokenWishes
from pageflight.backend.inputs import Row, word_list
from pageflight.backend.settings import ModelSettings
from pageflight.core import wire
from pageflight.core.config import EngineConfig, KVAdmission, KVConfig, LauncherName, SchedulerConfig, SchedulingPolicy
from pageflight.core.devices import DeviceSet
from pageflight.core.errors import ConfigError, InvalidArgument, PageflightError
from pageflight.core.manifest import EngineManifest
from pageflight.core.placement import Placement, Ranks, ranks_of
from pageflight.loop.core_process import CoreSpec, FakeEngine
from pageflight.loop.local import make_supervisor
from pageflight.loop.sibling_stops import SiblingStops
from pageflight.loop.supervisor import SupervisorConfig
from pageflight.loop.watch import Watch

log = logging.getLogger(__name__)

Config = TypeVar("Config")

START_TIMEOUT_S = 1800.0
"""Loading a large engine from a slow disk takes its time."""

READY_SLACK_S = 5.0
"""The supervisor, which knows what it waited for in vain, is the one to say so."""

CUT_OFF_S = 1.0
"""What a front needs to end the requests whose time is over."""


class EngineModel(FrontModel):
    """One instance: a supervised core, and the fronts to it and to those of the other instances."""

    def __init__(self, settings: ModelSettings) -> None:
        addresses = core_addresses(settings, settings.name, settings.num_instances)
        own = addresses[settings.instance]
        self._supervisor = make_supervisor(core_spec(settings), own, config=supervision(settings))
        self._supervisor.start()
        try:
            super().__init__(settings, addresses, tensors=wire.ENGINE_INPUTS, publishes_core=True)
            self._stops = SiblingStops([address.folder for address in addresses], settings.instance, self.watch.cancel)
        except BaseException:
            self._supervisor.close(0.0)
            raise

    def prompt_of(self, row: Row) -> tuple[tuple[int, ...], TokenWishes, Callable[[], str]]:
        array = row.arrays.get("input_ids")
        if array is None:
            raise InvalidArgument("input_ids", None, "is required")
        length = row.number("input_lengths", array.size)
        if not 1 <= length <= array.size:
            raise InvalidArgument("input_lengths", length, f"must be 1 to {array.size}, the length of input_ids")
        prompt_ids = tuple(array.ravel()[:length].tolist())
        return prompt_ids, self._wishes(row), lambda: self.builder.tokenizer.decode(prompt_ids)

    def serve(self, request: triton.TritonRequest) -> None:
        if not self._has_stopped(request):
            super().serve(request)

    def start(self) -> None:
        """Wait for the core. Raises the typed error that keeps it from starting."""
        try:
            self._supervisor.wait_ready(START_TIMEOUT_S + READY_SLACK_S)
            self.front.wait_ready(START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise
        super().start()

    def close(self) -> None:
        until_s = time.monotonic() + self.shutdown.left_s()
        super().close()
        self._stops.close()
        # Fronts of other models may have something open in this core; they cut it off themselves at the same time.
        self._supervisor.close(max(0.0, until_s - time.monotonic()) + CUT_OFF_S)

    def _has_stopped(self, request: triton.TritonRequest) -> bool:
        """TensorRT-LLM's way to cancel: a request with `stop` set and the id of the open one."""
        if not any(tensor.name() == "stop" and tensor.as_numpy().any() for tensor in request.inputs()):
            return False
        reply = self.reply_to(request)
        number = request.request_id()
        if not number:
            reply.fail(InvalidArgument("stop", True, "needs the id of the request to cancel, as this request's own"))
        elif self._stops.cancel(number):
            reply.end_empty()
        else:
            reply.fail(InvalidArgument("stop", number, "no request with this id is open"))
        return True

    def _wishes(self, row: Row) -> TokenWishes:
        stop, bad, bias = (row.arrays.get(name) for name in ("stop_words_list", "bad_words_list", "embedding_bias"))
        logit_bias: tuple[tuple[int, float], ...] = ()
        if bias is not None:
            vocab_size = self.builder.manifest.vocab_size
            flat = bias.ravel()
            if flat.size != vocab_size or not np.isfinite(flat).all():
                shown = f"{flat.size} numbers"
                raise InvalidArgument("embedding_bias", shown, f"must be {vocab_size} finite numbers")
            ids = np.flatnonzero(flat)
            logit_bias = tuple(zip(ids.tolist(), flat[ids].tolist(), strict=True))
        return TokenWishes(
            stop_ids=word_list("stop_words_list", stop) if stop is not None else (),
            bad_ids=word_list("bad_words_list", bad) if bad is not None else (),
            logit_bias=logit_bias,
        )


def supervision(settings: ModelSettings) -> SupervisorConfig:
    """How patient the supervisor of this instance's core is. Raises ConfigError."""
    return SupervisorConfig(hang_limit_s=settings.number("hang_limit_s", 1), start_timeout_s=START_TIMEOUT_S)


def core_spec(settings: ModelSettings) -> CoreSpec:
    """What the core of this instance runs. Raises ManifestMismatch and ConfigError."""
    placement = settings.placement
    engine_dir = settings.repository / placement.engine_dir
    manifest = EngineManifest.read(engine_dir)
    fake = settings.parameters.get("fake_engine", "")
    try:
        fake_engine = msgspec.json.decode(fake, type=FakeEngine) if fake else None
    except msgspec.DecodeError as error:
        raise ConfigError(f"config.pbtxt of {settings.name}: fake_engine={fake!r}: {error}") from None
    tenants = settings.text("tenants")
    default = Ranks(settings.number("tensor_parallel", 1), settings.number("pipeline_parallel", 1))
    ranks = ranks_of(placement.devices, placement.tensor_parallel, placement.pipeline_parallel, default)
    return CoreSpec(
        config=EngineConfig(
            kv=_cache(settings, placement, manifest.block_size),
            scheduler=_scheduler(settings, manifest.max_model_len),
            num_threads=settings.number("num_threads", 0) or _num_cores(placement.devices),
            tensor_parallel=ranks.tensor_parallel,
            pipeline_parallel=ranks.pipeline_parallel,
            launcher=cast(LauncherName, settings.choice("launcher", get_args(LauncherName))),
            num_nodes=settings.number("nodes", 1),
            rank_port=settings.number("rank_port", 1),
            rank_wait_s=settings.real("rank_wait_s"),
            ray_address=settings.text("ray_address"),
        ),
        engine_dir="" if fake_engine is not None else str(engine_dir),
        num_instances=settings.num_beside,
        devices=placement.devices,
        fake=fake_engine,
        tenants_file=str(settings.repository / tenants) if tenants else "",
        instance=settings.instance,
        watch=Watch.of_environment(os.environ),
    )


def _num_cores(devices: DeviceSet) -> int:
    """Of an instance that has its own; 0 for one that shares all."""
    return len(devices.numbers) if devices.kind == "cpu" else 0


def _cache(settings: ModelSettings, placement: Placement, block_size: int) -> KVConfig:
    memory_bytes, utilization = placement.kv_memory, placement.gpu_memory_utilization
    return _made(
        KVConfig,
        settings,
        block_size=block_size,
        memory_bytes=settings.number("kv_memory", 0) if memory_bytes is None else memory_bytes,
        prefix_cache=settings.flag("prefix_cache"),
        host_memory_bytes=settings.number("host_kv_memory", 0),
        gpu_memory_utilization=settings.real("gpu_memory_utilization") if utilization is None else utilization,
    )


def _scheduler(settings: ModelSettings, max_model_len: int) -> SchedulerConfig:
    return _made(
        SchedulerConfig,
        settings,
        max_num_tokens=settings.number("max_num_tokens", 1),
        max_num_seqs=settings.number("max_num_seqs", 1),
        max_model_len=max_model_len,
        max_queue_size=settings.number("max_queue_size", 1),
        max_queue_tokens=settings.number("max_queue_tokens", 0),
        scheduling_policy=cast(SchedulingPolicy, settings.text("scheduling_policy")),
        ageing_s=settings.real("ageing_s"),
        kv_admission=cast(KVAdmission, settings.text("kv_admission")),
        kv_watermark=settings.real("kv_watermark"),
        target_inter_token_ms=settings.real("target_inter_token_ms"),
        deterministic=settings.flag("deterministic"),
    )


def _made(config: Callable[..., Config], settings: ModelSettings, **values: object) -> Config:
    """What `config` makes of values that are read already. Raises ConfigError saying where the wrong one stands."""
    try:
        return config(**values)
    except ConfigError as error:
        raise ConfigError(f"config.pbtxt of {settings.name}: {error}") from None


class TritonPythonModel:
    """Triton's interface to `EngineModel`; decoupled."""

    def initialize(self, args: Mapping[str, str]) -> None:
        try:
            self._model = EngineModel(read_settings(args))
            self._model.start()
        except PageflightError as error:
            raise triton.start_error(args["model_name"], error) from None

    def execute(self, requests: Sequence[triton.TritonRequest]) -> None:
        for request in requests:
            self._model.serve(request)

    def is_ready(self) -> bool:
        """Asked with every readiness check by servers that know this; 2.51 does not."""
        return self._model.is_ready

    def finalize(self) -> None:
        self._model.close()
