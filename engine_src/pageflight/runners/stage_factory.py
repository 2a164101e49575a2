"""From the layers of a stage, loaded in this process, to a runner with what memory the machine has for K/V blocks."""

from __future__ import annotations

from pageflight.core.config import EngineConfig
from pageflight.core.manifest import EngineManifest
from pageflight.kv.capacity import Capacity
from pageflight.lowering.communicator import Communicator
from pageflight.lowering.torch_lowering import TorchModel
from pageflight.runners.host import capacity_on_host, closed_on_error
from pageflight.runners.stage_runner import StageRunner


def run_stage(
    model: TorchModel,
    manifest: EngineManifest,
    config: EngineConfig,
    communicator: Communicator,
    *,
    num_instances: int = 1,
) -> tuple[StageRunner, Capacity]:
    """A runner of `model` that owns it, and its cache; the model is closed if there can be none. A step is as many
    micro-batches as there are stages. Raises ConfigError for settings that cannot work."""
    with closed_on_error(model):
        capacity = capacity_on_host(model, manifest, config, num_instances, communicator)
        runner = StageRunner(
            model,
            communicator,
            capacity,
            max_num_seqs=config.scheduler.max_num_seqs,
            num_micro_batches=communicator.place.pipeline_parallel,
            deterministic=config.scheduler.deterministic,
        )
    return runner, capacity
