"""The Triton side of a model repository: `config.pbtxt` from typed objects, `model.py` that re-exports.

Tensors come from `pageflight.core.wire`, settings from a `Deployment`. What is written here is never edited by string
substitution; settings that a person may change by hand are `parameters` of the generated files.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from google.protobuf import text_format  # type: ignore[import-untyped]
from tritonclient.grpc import model_config_pb2

from pageflight.core import wire
from pageflight.core.config import EngineConfig
from pageflight.core.errors import ConfigError
from pageflight.core.placement import Placement, placements_text

MAX_BATCH_SIZE = 64
"""Rows of one request to the batched models. Requests are never merged: the scheduler batches by itself."""

TEMPLATE_NAME = "model"
"""The text model's name in the repository's own `model_repository/`, which shows what a build writes."""

_KINDS = ("preprocessing", "engine", "postprocessing", "text", "unary", "ensemble")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One checkpoint's models in a repository, and the settings that its `config.pbtxt` files carry.

    `prefixed`: the repository holds several checkpoints, so every model's name starts with `name`; `is_default` then
    says which of them owns the name `ensemble`. `engine_dir` is relative to the engine model's folder. `kv_memory` is
    bytes, 0 means computed from free memory; `host_kv_memory` too, 0 means none; `num_threads` 0 means all cores,
    shared by the instances. `placements`: of the instances, whose `engine_dir` is relative to the engine model's folder
    too; empty where they share the machine.
    """

    name: str
    engine_name: str = "engine"
    prefixed: bool = False
    is_default: bool = True
    engine_dir: str = "1/artifacts"
    instances: int = 1
    placements: tuple[Placement, ...] = ()
    session_affinity: str = "none"
    reroute_after_s: float = 10.0
    preprocessing_instances: int = 2
    postprocessing_instances: int = 1
    kv_memory: int = 0
    host_kv_memory: int = 0
    max_num_seqs: int = 256
    max_num_tokens: int = 256
    max_queue_size: int = 10_000
    max_queue_tokens: int = 0
    scheduling_policy: str = "priority"
    ageing_s: float = 60.0
    tenants: str = ""
    kv_admission: str = "forecast"
    gpu_memory_utilization: float = 0.9
    kv_watermark: float = 0.01
    target_inter_token_ms: float = 0.0
    hang_limit_s: int = 60
    num_threads: int = 0
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    launcher: str = "local"
    nodes: int = 1
    rank_port: int = EngineConfig().rank_port
    rank_wait_s: float = EngineConfig().rank_wait_s
    ray_address: str = EngineConfig().ray_address
    prefix_cache: bool = True
    deterministic: bool = False
    exclude_input_in_output: bool = True
    default_max_tokens: int = 256
    response_rate: int = 0
    fake_engine: str = ""
    """JSON of `loop.core_process.FakeEngine`: an engine without a model, to measure and test everything around it."""

    def __post_init__(self) -> None:
        for setting in ("instances", "preprocessing_instances", "postprocessing_instances"):
            if getattr(self, setting) < 1:
                raise ConfigError(f"{setting}={getattr(self, setting)}: must be at least 1")
        if len(self.placements) not in (0, self.instances):
            raise ConfigError(f"instances={self.instances}: there are {len(self.placements)} placements")
        names = list(model_names(self).values())
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ConfigError(
                f"name={self.name!r}, engine_name={self.engine_name!r}: two models would be named {doubled[0]!r}"
            )


def model_names(deployment: Deployment) -> dict[str, str]:
    """The Triton model name of each kind: preprocessing, engine, postprocessing, text, unary, ensemble."""
    prefix = f"{deployment.name}_" if deployment.prefixed else ""
    return {
        "preprocessing": f"{prefix}preprocessing",
        "engine": f"{prefix}{deployment.engine_name}",
        "postprocessing": f"{prefix}postprocessing",
        "text": deployment.name,
        "unary": f"{deployment.name}_unary",
        "ensemble": f"{prefix}ensemble" if prefix and not deployment.is_default else "ensemble",
    }


def engine_model_name(deployment: Deployment) -> str:
    """The folder, and the Triton name, of the model that holds the engine directory."""
    return model_names(deployment)["engine"]


def model_configs(deployment: Deployment) -> dict[str, model_config_pb2.ModelConfig]:
    """Every model of a deployment by its Triton name."""
    names = model_names(deployment)
    engine_dir = {"engine_dir": str(PurePosixPath(names["engine"]) / deployment.engine_dir)}
    text_settings = {
        **engine_dir,
        "exclude_input_in_output": _flag(deployment.exclude_input_in_output),
        "default_max_tokens": str(deployment.default_max_tokens),
        "response_rate": str(deployment.response_rate),
        "session_affinity": deployment.session_affinity,
        "reroute_after_s": str(deployment.reroute_after_s),
    }
    placements = [
        replace(placement, engine_dir=str(PurePosixPath(names["engine"]) / placement.engine_dir))
        for placement in deployment.placements
    ]
    engine_settings = {
        **text_settings,
        "placement": placements_text(placements),
        "kv_memory": str(deployment.kv_memory),
        "host_kv_memory": str(deployment.host_kv_memory),
        "max_num_seqs": str(deployment.max_num_seqs),
        "max_num_tokens": str(deployment.max_num_tokens),
        "max_queue_size": str(deployment.max_queue_size),
        "max_queue_tokens": str(deployment.max_queue_tokens),
        "scheduling_policy": deployment.scheduling_policy,
        "ageing_s": str(deployment.ageing_s),
        "tenants": deployment.tenants,
        "kv_admission": deployment.kv_admission,
        "gpu_memory_utilization": str(deployment.gpu_memory_utilization),
        "kv_watermark": str(deployment.kv_watermark),
        "target_inter_token_ms": str(deployment.target_inter_token_ms),
        "hang_limit_s": str(deployment.hang_limit_s),
        "num_threads": str(deployment.num_threads),
        "tensor_parallel": str(deployment.tensor_parallel),
        "pipeline_parallel": str(deployment.pipeline_parallel),
        "launcher": deployment.launcher,
        "nodes": str(deployment.nodes),
        "rank_port": str(deployment.rank_port),
        "rank_wait_s": str(deployment.rank_wait_s),
        "ray_address": deployment.ray_address,
        "prefix_cache": _flag(deployment.prefix_cache),
        "deterministic": _flag(deployment.deterministic),
    }
    if deployment.fake_engine:
        engine_settings["fake_engine"] = deployment.fake_engine
    to_engine = {**text_settings, "engine_model": names["engine"], "engine_instances": str(deployment.instances)}
    configs = (
        _python_model(
            names["preprocessing"],
            wire.PREPROCESSING_INPUTS,
            wire.PREPROCESSING_OUTPUTS,
            engine_dir,
            instances=deployment.preprocessing_instances,
            max_batch_size=MAX_BATCH_SIZE,
        ),
        _python_model(
            names["engine"],
            wire.ENGINE_INPUTS,
            wire.ENGINE_OUTPUTS,
            engine_settings,
            instances=deployment.instances,
            placements=deployment.placements,
            max_batch_size=MAX_BATCH_SIZE,
            decoupled=True,
        ),
        _python_model(
            names["postprocessing"],
            wire.POSTPROCESSING_INPUTS,
            wire.POSTPROCESSING_OUTPUTS,
            engine_dir,
            instances=deployment.postprocessing_instances,
            max_batch_size=MAX_BATCH_SIZE,
        ),
        _python_model(
            names["text"],
            wire.TEXT_INPUTS,
            wire.TEXT_OUTPUTS,
            to_engine,
            instances=deployment.instances,
            decoupled=True,
        ),
        _python_model(names["unary"], wire.TEXT_INPUTS, wire.TEXT_OUTPUTS, to_engine, instances=deployment.instances),
        _ensemble(names),
    )
    return {config.name: config for config in configs}


def config_text(config: model_config_pb2.ModelConfig) -> str:
    """The content of `config.pbtxt`."""
    text: str = text_format.MessageToString(config)
    return text


def repository_files(deployment: Deployment) -> dict[PurePosixPath, str]:
    """Every generated file of a deployment, by its path in the repository."""
    names = model_names(deployment)
    configs = model_configs(deployment)
    files = {}
    for kind in _KINDS:
        name = names[kind]
        files[PurePosixPath(name, "config.pbtxt")] = config_text(configs[name])
        if kind != "ensemble":
            files[PurePosixPath(name, "1", "model.py")] = _MODEL_PY.format(module=kind)
    return files


def write_repository(target: Path, deployment: Deployment) -> tuple[Path, ...]:
    """Write a deployment's models into the repository `target`; the written files. Engines are not touched."""
    written = []
    for path, content in repository_files(deployment).items():
        file = target / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
        written.append(file)
    # Triton wants a version folder in every model, in an ensemble too.
    (target / model_names(deployment)["ensemble"] / "1").mkdir(parents=True, exist_ok=True)
    return tuple(written)


_MODEL_PY = '''"""Loaded by Triton's Python backend; the model itself is part of the installed package."""

from pageflight.backend.{module} import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _python_model(
    name: str,
    inputs: Iterable[wire.Tensor],
    outputs: Iterable[wire.Tensor],
    parameters: Mapping[str, str],
    *,
    instances: int,
    placements: Sequence[Placement] = (),
    max_batch_size: int = 0,
    decoupled: bool = False,
) -> model_config_pb2.ModelConfig:
    config = model_config_pb2.ModelConfig(name=name, backend="python", max_batch_size=max_batch_size)
    _add_tensors(config, inputs, outputs)
    if placements:
        _add_groups(config, placements)
    else:
        config.instance_group.add(count=instances, kind=model_config_pb2.ModelInstanceGroup.KIND_CPU)
    if decoupled:
        config.model_transaction_policy.decoupled = True
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    return config


def _add_groups(config: model_config_pb2.ModelConfig, placements: Sequence[Placement]) -> None:
    """A group for each instance, in their order. Triton places one on a GPU; sets of GPUs it has no words for.

    The rate limiter's resources are the devices, one unit of each per instance, the same for all models.
    """
    group_kinds = model_config_pb2.ModelInstanceGroup
    taken: set[str] = set()
    for number, placement in enumerate(placements):
        devices = placement.devices
        name = devices.name if devices.name not in taken else f"{devices.name}_{number}"
        taken.add(name)
        group = config.instance_group.add(name=name, count=1, kind=group_kinds.KIND_CPU)
        if devices.kind == "gpu":
            group.kind = group_kinds.KIND_GPU if len(devices.numbers) == 1 else group_kinds.KIND_MODEL
            group.gpus.extend(devices.numbers if len(devices.numbers) == 1 else ())
        group.rate_limiter.priority = 1
        resources = [f"{devices.kind}{index}" for index in devices.numbers] or [devices.kind]
        for resource in resources:
            group.rate_limiter.resources.add(name=resource, count=1, **{"global": True})


def _ensemble(names: Mapping[str, str]) -> model_config_pb2.ModelConfig:
    config = model_config_pb2.ModelConfig(name=names["ensemble"], platform="ensemble", max_batch_size=MAX_BATCH_SIZE)
    _add_tensors(config, wire.ENSEMBLE_INPUTS, wire.TEXT_OUTPUTS)
    first = config.ensemble_scheduling.step.add(model_name=names["preprocessing"], model_version=-1)
    first.input_map["QUERY"] = "text_input"
    first.output_map["INPUT_ID"] = "_INPUT_ID"
    first.output_map["REQUEST_INPUT_LEN"] = "_REQUEST_INPUT_LEN"
    second = config.ensemble_scheduling.step.add(model_name=names["engine"], model_version=-1)
    second.input_map["input_ids"] = "_INPUT_ID"
    second.input_map["input_lengths"] = "_REQUEST_INPUT_LEN"
    for tensor, spelling in wire.ENSEMBLE_TO_ENGINE.items():
        second.input_map[spelling] = tensor
    for output in wire.TEXT_OUTPUTS:
        second.output_map[output.name] = output.name
    return config


def _add_tensors(
    config: model_config_pb2.ModelConfig, inputs: Iterable[wire.Tensor], outputs: Iterable[wire.Tensor]
) -> None:
    for tensor in inputs:
        config.input.add(
            name=tensor.name,
            data_type=model_config_pb2.DataType.Value(f"TYPE_{tensor.dtype}"),
            dims=tensor.dims,
            optional=tensor.optional,
        )
    for tensor in outputs:
        config.output.add(
            name=tensor.name, data_type=model_config_pb2.DataType.Value(f"TYPE_{tensor.dtype}"), dims=tensor.dims
        )


if __name__ == "__main__":
    write_repository(Path(sys.argv[1]), Deployment(name=TEMPLATE_NAME))
