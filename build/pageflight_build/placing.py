"""From what each model's `--instances` asks for to where its instances run, with what each gets of a GPU's memory.

A GPU that several instances name, of one model or of several, is divided: those that say their part get it, the others
share alike what that leaves of `gpu_memory_utilization`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pageflight.core.errors import ConfigError
from pageflight.core.placement import Placement
from pageflight_build.instances import InstanceSpec, parse_instances
from pageflight_build.record import ModelRecord

_LEAST_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class _Claim:
    """What an instance of a model wants of its GPUs: its own part, or one of `limit` that it shares."""

    model: str
    instance: InstanceSpec
    limit: float

    @property
    def part(self) -> float | None:
        return self.instance.gpu_memory_utilization


def placements_of(models: Sequence[ModelRecord]) -> dict[str, tuple[Placement, ...]]:
    """The placements of each model's instances by its name; none where they share the machine. `engine_dir` is relative
    to the engine model's folder. Raises ConfigError when more of a GPU is promised than there is."""
    wanted = {model.name: parse_instances(model.serving.instances) for model in models}
    limits = {model.name: model.serving.gpu_memory_utilization for model in models}
    claims: dict[int, list[_Claim]] = {}
    for name, instances in wanted.items():
        for instance in instances:
            for gpu in instance.devices.numbers if instance.devices.kind == "gpu" else ():
                claims.setdefault(gpu, []).append(_Claim(name, instance, limits[name]))
    shares = {gpu: _share_of_others(gpu, claimed) for gpu, claimed in claims.items()}
    return {
        model.name: tuple(
            Placement(
                devices=instance.devices,
                engine_dir=engine.folder,
                gpu_memory_utilization=_utilization(instance, shares),
                kv_memory=instance.kv_memory,
                tensor_parallel=instance.tensor_parallel,
                pipeline_parallel=instance.pipeline_parallel,
            )
            for instance, engine in zip(wanted[model.name], model.engines, strict=False)  # one of all that are alike
            if instance.devices.kind != "any"
        )
        for model in models
    }


def _utilization(instance: InstanceSpec, shares: dict[int, float | None]) -> float | None:
    """What stands in the placement: None is the model's own, of GPUs that it has alone."""
    if instance.gpu_memory_utilization is not None or instance.devices.kind != "gpu":
        return instance.gpu_memory_utilization
    found = [share for gpu in instance.devices.numbers if (share := shares[gpu]) is not None]
    return min(found, default=None)


def _share_of_others(gpu: int, claims: Sequence[_Claim]) -> float | None:
    """The part of each instance on a GPU that does not say its own; None where nothing is divided."""
    if len(claims) == 1:
        return None
    promised = sum(claim.part or 0.0 for claim in claims)
    others = [claim for claim in claims if claim.part is None]
    left = min(claim.limit for claim in others) - promised if others else 1.0 - promised
    share = left / len(others) if others else left
    if share < (_LEAST_SHARE if others else -1e-9):
        names = ", ".join(dict.fromkeys(claim.model for claim in claims))
        raise ConfigError(
            f"instances: gpu{gpu} of {names}: gpu_memory_utilization={promised:g} of it is promised already;"
            f" {'nothing is left for the others' if others else 'together they must be at most 1'}"
        )
    return round(share, 4) if others else None
