"""From what each model's `--instances` asks for to where its instances run, with what each gets of a GPU's memory.

A GPU that several instances name, of one model or of several, is divided: those that say their part get it, the others
share alike what that leaves of `gpu_memory_utilization`. Models whose instances name no devices run on the first GPUs
that they find: where they and others would take more than there is, each gets its part of what was asked. Of a model on
several machines only those of this one count; where Ray chooses GPUs, which ones they are is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pageflight.core.errors import ConfigError
from pageflight.core.placement import Placement
from pageflight_build.instances import InstanceSpec, parse_instances
from pageflight_build.record import ModelRecord

_LEAST_SHARE = 0.01
_ON_GPUS = ("torch", "tensorrt")
"""Engines that run on a GPU where they find one."""


@dataclass(frozen=True, slots=True)
class _Claim:
    """What an instance of a model wants of a GPU: its own `part`, or one of `limit` that it shares. A model whose
    instances name no devices has one claim for all of them, and `finds` the GPU."""

    model: str
    limit: float
    part: float | None = None
    finds: bool = False


Claims = dict[int, list[_Claim]]


def placements_of(models: Sequence[ModelRecord]) -> dict[str, tuple[Placement, ...]]:
    """The placements of each model's instances by its name; none where they share the machine. `engine_dir` is relative
    to the engine model's folder. Raises ConfigError when more of a GPU is promised than there is, and for two models
    that machines would join."""
    _check_joined(models)
    wanted = {model.name: parse_instances(model.serving.instances) for model in models}
    claims = _claims(models)
    return {
        model.name: tuple(
            Placement(
                devices=instance.devices,
                engine_dir=engine.folder,
                gpu_memory_utilization=_utilization(instance, model.serving.gpu_memory_utilization, claims),
                kv_memory=instance.kv_memory,
                tensor_parallel=instance.tensor_parallel,
                pipeline_parallel=instance.pipeline_parallel,
            )
            for instance, engine in zip(wanted[model.name], model.engines, strict=False)  # one of all that are alike
            if instance.devices.kind != "any"
        )
        for model in models
    }


def utilizations_of(models: Sequence[ModelRecord]) -> dict[str, float]:
    """`gpu_memory_utilization` of each model, for all its instances that have no part of their own. Raises ConfigError
    when more of a GPU is promised than there is."""
    claims = _claims(models)
    found = {model.name: model.serving.gpu_memory_utilization for model in models}
    for gpu, claimed in claims.items():
        for claim in claimed:
            share = _share(gpu, claimed, claim.limit) if claim.finds else None
            if share is not None:
                found[claim.model] = min(found[claim.model], share)
    return found


def _claims(models: Sequence[ModelRecord]) -> Claims:
    """By GPU. Raises ConfigError when more of one is promised than there is."""
    claims: Claims = {}
    for model in models:
        serving = model.serving
        limit = serving.gpu_memory_utilization
        instances = parse_instances(serving.instances)
        if instances[0].devices.kind == "any":
            for gpu in range(_num_found(model)):
                claims.setdefault(gpu, []).append(_Claim(model.name, limit, finds=True))
        for instance in instances:
            for gpu in instance.devices.numbers if instance.devices.kind == "gpu" else ():
                claims.setdefault(gpu, []).append(_Claim(model.name, limit, instance.gpu_memory_utilization))
    for gpu, claimed in claims.items():
        _share(gpu, claimed, min(claim.limit for claim in claimed))
    return claims


def _num_found(model: ModelRecord) -> int:
    """How many GPUs of this machine a model finds whose instances name no devices."""
    serving = model.serving
    if model.engines[0].engine not in _ON_GPUS or serving.launcher == "ray":
        return 0
    return serving.tensor_parallel * serving.pipeline_parallel // serving.nodes


def _check_joined(models: Sequence[ModelRecord]) -> None:
    """Raises ConfigError where machines that join could not tell which model they are for."""
    joined = [model.name for model in models if model.serving.launcher == "external"]
    if len(joined) > 1:
        raise ConfigError(
            f"launcher='external': {' and '.join(joined)} would both be joined by other machines, and a repository has"
            " one such model; build the other into a repository of its own"
        )


def _utilization(instance: InstanceSpec, limit: float, claims: Claims) -> float | None:
    """What stands in the placement: None is the model's own, of GPUs that it has alone."""
    if instance.gpu_memory_utilization is not None or instance.devices.kind != "gpu":
        return instance.gpu_memory_utilization
    found = [share for gpu in instance.devices.numbers if (share := _share(gpu, claims[gpu], limit)) is not None]
    return min(found, default=None)


def _share(gpu: int, claims: Sequence[_Claim], limit: float) -> float | None:
    """The part of one that wants `limit` of a GPU and does not say its own; None where nothing is divided."""
    if not any(claim.finds for claim in claims):
        return _share_of_others(gpu, claims)
    promised = sum(claim.part or 0.0 for claim in claims)
    limits = [claim.limit for claim in claims if claim.part is None]
    if promised + sum(limits) <= 1.0 + 1e-9:
        return None
    share = limit * (max(limits) - promised) / sum(limits)
    if share < _LEAST_SHARE:
        raise _promised_already(gpu, claims, promised, "nothing is left for the others")
    return int(share * 10_000) / 10_000  # never up: the sum counts


def _share_of_others(gpu: int, claims: Sequence[_Claim]) -> float | None:
    """The part of each instance on a GPU that does not say its own; None where nothing is divided."""
    if len(claims) == 1:
        return None
    promised = sum(claim.part or 0.0 for claim in claims)
    others = [claim for claim in claims if claim.part is None]
    left = min(claim.limit for claim in others) - promised if others else 1.0 - promised
    share = left / len(others) if others else left
    if share < (_LEAST_SHARE if others else -1e-9):
        reason = "nothing is left for the others" if others else "together they must be at most 1"
        raise _promised_already(gpu, claims, promised, reason)
    return round(share, 4) if others else None


def _promised_already(gpu: int, claims: Sequence[_Claim], promised: float, reason: str) -> ConfigError:
    names = ", ".join(dict.fromkeys(claim.model for claim in claims))
    return ConfigError(
        f"instances: gpu{gpu} of {names}: gpu_memory_utilization={promised:g} of it is promised already; {reason}"
    )
