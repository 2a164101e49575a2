"""TensorRT's engines of two ranks: made for the cards, and loaded by each rank so that nothing else serves them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from pageflight.core.errors import ConfigError
from pageflight.lowering.communicator import Communicator
from pageflight.lowering.engine_dir import EngineDir
from pageflight.lowering.tensorrt_build import lower, rank_part
from pageflight.lowering.tensorrt_model import SegmentModel, load_segments
from pageflight.lowering.tensorrt_plan import EnginePlan
from pageflight.lowering.tensorrt_target import COLLECTIVES, FLAVORS, TensorRtTarget, check_collectives, import_flavor
from pageflight.models.config import DecoderConfig
from pageflight.quant.forms import weight_forms
from perf.gpu_check.card import Card, Record, attempted
from perf.gpu_check.network_walk import Walk, WalkedSegments
from perf.gpu_check.tensorrt_flavors import tried, usable
from perf.gpu_check.tensorrt_models import RandomTensors, write_engine

SIZE = 2
MAX_SEQS = 8


def ranks_of_tensorrt(
    card: Card,
    folder: Path,
    config: DecoderConfig,
    max_num_tokens: int,
    compare: Callable[[str, Path], Record],
) -> Iterator[Record]:
    """For every flavor that takes the card, and sums between engines and inside them: engines of the model that the
    others have too, and what `compare` finds, given a name and their folder. What this TensorRT lacks is skipped,
    with the reason."""
    has_checked = False
    for flavor in usable(card):
        for collectives in COLLECTIVES:
            has_checked = True
            name = f"tensor parallel {SIZE} of TensorRT {flavor.flavor}, sums {collectives} engines"
            target = flavor.target("input", MAX_SEQS, max_num_tokens)
            target = replace(target, tensor_parallel=SIZE, collectives=collectives)
            try:
                check_collectives(flavor.trt, target)
            except ConfigError as error:
                yield {"name": name, "skipped": str(error)}
                continue
            place = folder / f"{flavor.flavor}-{collectives}"
            yield attempted(name, partial(_built_and_compared, name, place, config, target, compare))
    if not has_checked:
        reasons = (f"{flavor}: {tried(flavor, card)[0]['reason']}" for flavor in FLAVORS)
        yield {"name": f"tensor parallel {SIZE} of TensorRT", "skipped": "; ".join(reasons)}


def _built_and_compared(
    name: str, folder: Path, config: DecoderConfig, target: TensorRtTarget, compare: Callable[[str, Path], Record]
) -> Record:
    write_engine(folder, config, RandomTensors(weight_forms(config, "fp32")), "fp32", target)
    return compare(name, folder)


def load_rank(engine: EngineDir, folder: Path, device: torch.device, *, communicator: Communicator) -> SegmentModel:
    """One rank's segments on its card; without a GPU its networks, walked. Raises RuntimeError where TensorRT cannot:
    a ConfigError would have our own kernels give the right ids."""
    try:
        if device.type == "cuda":
            return load_segments(engine, folder, device, communicator=communicator)
        plan = EnginePlan.read(folder)
        target = TensorRtTarget(tensor_parallel=plan.tensor_parallel, collectives=plan.collectives)
        rank = communicator.place.shard.rank
        tensors, config, joint = rank_part(engine.weights, engine.config, rank, 1, target)
        trt, num_positions = import_flavor(plan.flavor), engine.manifest.max_model_len
        made = lower(trt, config, tensors.forms, activations=plan.activations, num_positions=num_positions, joint=joint)
        walks = {name: Walk(trt, each, all_reduce=communicator.all_reduce) for name, each in made.segments.items()}
        segments = WalkedSegments(walks, {segment.name: segment for segment in plan.of_rank(rank).segments})
        return load_segments(engine, folder, device, segments, communicator)
    except ConfigError as error:
        raise RuntimeError(str(error)) from error
