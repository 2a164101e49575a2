"""One model on several ranks: this process is the first, the others are started by a launcher and watched.

All ranks get the same plans, one message per step, and compute them with their parts of the weights. Within a stage
logits are gathered, so all ranks of the last one sample the same ids from the same bits; other stages are told.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from pageflight.core.config import EngineConfig
from pageflight.core.errors import ConfigError, RankLost
from pageflight.core.manifest import EngineManifest, manifest_digest
from pageflight.core.plan import StepPlan, StepResult
from pageflight.kv.capacity import Capacity
from pageflight.lowering import registry
from pageflight.lowering.engine_dir import Verification, open_engine
from pageflight.lowering.torch_lowering import TorchLowering
from pageflight.models.sharding import Shard
from pageflight.models.stages import Place, check_engine, check_nodes
from pageflight.ranks.launcher import Progress
from pageflight.ranks.launchers import open_launcher
from pageflight.ranks.messages import RankSpec, digest_of
from pageflight.ranks.plan_frames import PlanEncoder
from pageflight.ranks.process_group import GroupCommunicator, open_store, reach_store
from pageflight.ranks.processes import GRACE_S, OnLoss, RankProcesses
from pageflight.runners.base import BusyRunner, Runner, StagingRunner
from pageflight.runners.host import run_on_host
from pageflight.runners.occupancy import Occupancy
from pageflight.runners.stage_factory import run_stage

log = logging.getLogger(__name__)


class ParallelRunner:
    """Runs plans on the first rank's `runner` while the other ranks run them too. Raises RankLost when one is gone, or
    has sampled other ids."""

    def __init__(self, runner: Runner, ranks: RankProcesses, communicator: GroupCommunicator) -> None:
        self.limits = runner.limits
        self._runner, self._ranks, self._communicator = runner, ranks, communicator
        self._plans = PlanEncoder()
        self._num_in_flight = 0
        self._digests: dict[int, tuple[int, int]] = {}  # by step: of the first rank's result, and ranks yet to come
        self._early: list[tuple[int, int, int]] = []  # rank, step and digest of results that the first does not have
        self._is_whole = True
        self._occupancy = Occupancy(communicator.place.num_ranks)

    @property
    def idle_share(self) -> float:
        """Of the time in which steps were under way of late, what ranks did not compute."""
        return self._occupancy.idle_share

    def submit(self, plan: StepPlan) -> None:
        """Tell all ranks, and begin the forward pass here."""
        self._occupancy.begin(time.monotonic())
        self._num_in_flight += 1  # and it stays so where this fails: ranks may be waiting for a sum
        self._ranks.send(self._plans.message(plan))
        with _explained(self._ranks):
            self._runner.submit(plan)

    def stage(self, plan: StepPlan) -> None:
        """Prepare the next plan here. The other ranks have time for that while this one settles a step."""
        if isinstance(self._runner, StagingRunner):
            self._runner.stage(plan)

    def collect(self) -> StepResult:
        """The first rank's result, and what all others have said of theirs so far must agree with it."""
        with _explained(self._ranks):
            result = self._runner.collect()
        self._num_in_flight -= 1
        self._compare(result)
        if isinstance(self._runner, BusyRunner):
            self._occupancy.computed(0, self._runner.busy_s)
            if self._occupancy.end(time.monotonic(), is_last=not self._num_in_flight):
                log.debug("ranks waited for %.0f %% of the time", 100 * self.idle_share)
        return result

    def close(self) -> None:
        is_whole = self._is_whole and not self._num_in_flight and self._ranks.loss() is None
        self._ranks.dismiss(at_once=not is_whole)
        self._runner.close()
        self._communicator.close(is_whole=is_whole)
        self._ranks.close()

    def _compare(self, result: StepResult) -> None:
        self._digests[result.step] = digest_of(result), self._communicator.place.num_ranks - 1
        for rank, computed in self._ranks.computed():
            self._early.append((rank, computed.step, computed.digest))
            self._occupancy.computed(rank, computed.busy_s)
        arrived, self._early = self._early, []
        for rank, step, theirs in arrived:
            if step not in self._digests:
                self._early.append((rank, step, theirs))
                continue
            ours, num_missing = self._digests.pop(step)
            if theirs != ours:
                self._is_whole = False
                raise RankLost(f"rank {rank} has other results than rank 0 in step {step}")
            if num_missing > 1:
                self._digests[step] = ours, num_missing - 1


def load_parallel(
    engine_dir: Path,
    config: EngineConfig,
    *,
    num_threads: int,
    num_instances: int,
    on_loss: OnLoss | None = None,
    progress: Progress = log.info,
) -> tuple[ParallelRunner, Capacity]:
    """Load an engine onto `config.pipeline_parallel` stages of `config.tensor_parallel` ranks, each with its part of
    the weights, of the layers and of the K/V heads.

    `num_threads` are shared by the ranks of a machine. `on_loss`: see `RankProcesses`. `progress` is told which ranks
    are waited for. Raises ConfigError for sizes that do not work, ManifestMismatch for an engine that does not fit,
    RankLost when a rank dies meanwhile, RanksMissing when others have not started theirs in time.
    """
    tensor_parallel, pipeline_parallel = config.tensor_parallel, config.pipeline_parallel
    check_nodes(config)
    name = EngineManifest.read(engine_dir).lowering
    check_engine(name, tensor_parallel, pipeline_parallel)
    if name == "tensorrt":
        engine = open_engine(engine_dir, name, tensor_parallel)
        if not torch.cuda.is_available():
            registry.get(name).load(engine_dir, num_threads=num_threads)  # says what is missing
    else:
        engine = TorchLowering().opened(engine_dir)
    engine.split(Shard(rank=0, size=tensor_parallel))  # refuses what does not work before a process is started
    stages = engine.stages(pipeline_parallel)
    if len(stages) > 1:
        log.info("layers of the stages: %s", ", ".join(f"{stage.begin}-{stage.end - 1}" for stage in stages))
    first = Place(rank=0, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel)
    num_local = first.num_ranks // config.num_nodes
    launcher, places = open_launcher(config, progress), [replace(first, rank=rank) for rank in range(first.num_ranks)]
    ranks = RankProcesses(launcher, places[1:], on_loss)
    with ExitStack() as failed:
        failed.callback(ranks.close)
        failed.callback(ranks.dismiss, at_once=True)
        device = _device(first, launcher.device_index, num_local)
        if device.type == "cuda" and config.launcher == "ray":
            num_instances = 1  # Ray gives each of them GPUs that no other has
        store, port = open_store(launcher.host)
        specs = [
            RankSpec(
                engine_dir=str(engine_dir),
                manifest_digest=manifest_digest(engine_dir),
                config=config,
                place=place,
                device=device.type,
                host=launcher.host,
                port=port,
                num_threads=num_threads,
                num_instances=num_instances,
            )
            for place in places
        ]
        ranks.tell(specs[1:])
        ranks.wait_present()
        with _explained(ranks):
            with ranks.meeting():
                communicator = GroupCommunicator(first, store, device, launcher.host)
            failed.callback(communicator.close, is_whole=False)
            runner, capacity = _load(specs[0], communicator, device)
        failed.pop_all()
    return ParallelRunner(runner, ranks, communicator), capacity


@contextmanager
def _explained(ranks: RankProcesses) -> Iterator[None]:
    """A sum fails where a rank has died: that is what is raised then."""
    try:
        yield
    except RuntimeError as error:
        loss = ranks.loss(wait_s=GRACE_S)
        if loss is None:
            raise
        raise loss from error


def join(
    spec: RankSpec, device_index: int, present: Callable[[], None], *, verifies: bool = False
) -> tuple[Runner, GroupCommunicator]:
    """In the process of another rank, on the GPU of its machine that `device_index` names where there are any: meet the
    others and load this rank's part. `present` is called when nothing of this machine's is missing: the others then
    wait for this rank, and not for long. `verifies` the files of an engine that the first rank does not read."""
    manifest = EngineManifest.read(Path(spec.engine_dir))
    engine = open_engine(Path(spec.engine_dir), manifest.lowering, manifest.tensor_parallel)
    device = _device(spec.place, device_index)
    _check_device(spec, device)
    store = reach_store(spec.host, spec.port)
    present()
    verification = Verification(engine) if verifies else None
    communicator = GroupCommunicator(spec.place, store, device, spec.host)
    runner, _ = _load(spec, communicator, device)
    if verification is not None:
        verification.finish()
    return runner, communicator


def _check_device(spec: RankSpec, device: torch.device) -> None:
    """Raises ConfigError where the first rank computes on another kind of device: each would wait for the others in a
    group of its own kind."""
    if device.type == spec.device:
        return
    where = f"rank {spec.place.rank} on {socket.gethostname()}"
    if spec.device == "cuda":
        raise ConfigError(f"{where}: torch sees no GPU there, and the first rank computes on one")
    raise ConfigError(
        f"{where}: the first rank sees no GPU and computes on a processor, torch sees {torch.cuda.device_count()} GPUs"
        " there; give the first rank's machine its own, or hide these with CUDA_VISIBLE_DEVICES="
    )


def _load(spec: RankSpec, communicator: GroupCommunicator, device: torch.device) -> tuple[Runner, Capacity]:
    engine_dir, lowering = Path(spec.engine_dir), TorchLowering()
    if device.type == "cuda":
        from pageflight.runners.device_factory import load_on_gpu  # brings triton

        return load_on_gpu(engine_dir, spec.config, device, num_instances=spec.num_instances, communicator=communicator)
    # Divided by who is really here: machines that share a kernel, as when several are tried on one, share its cores.
    num_threads = max(1, spec.num_threads // communicator.num_here)
    model = lowering.load_rank(engine_dir, communicator, num_threads=num_threads)
    manifest, num_instances = EngineManifest.read(engine_dir), spec.num_instances
    if spec.place.pipeline_parallel > 1:
        return run_stage(model, manifest, spec.config, communicator, num_instances=num_instances)
    return run_on_host(lowering, model, manifest, spec.config, num_instances=num_instances, communicator=communicator)


def _device(place: Place, index: int, num_local: int = 0) -> torch.device:
    """Where a rank computes: on the GPU of this index, of those that this process sees, or on the processor where there
    is none. Raises ConfigError for fewer GPUs than that, or than `num_local` ranks of this machine."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if torch.cuda.device_count() < max(index + 1, num_local):
        raise ConfigError(
            f"tensor_parallel={place.tensor_parallel}, pipeline_parallel={place.pipeline_parallel}: each rank needs a"
            f" GPU of its own, {torch.cuda.device_count()} are here"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
