"""From the definition to engines: networks, profiles, serialised bytes, and the plan that says how they run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pageflight.core.errors import ConfigError, ManifestMismatch
from pageflight.lowering.tensorrt_caches import TimingCache, timing_path
from pageflight.lowering.tensorrt_gpu import find_gpu
from pageflight.lowering.tensorrt_network import Network
from pageflight.lowering.tensorrt_ops import StoredTensors, TensorRtOps, stored_name
from pageflight.lowering.tensorrt_plan import ROWS, TOKENS, EnginePlan, Profile, Run, Segment, profiles
from pageflight.lowering.tensorrt_ranks import Joint, RankTensors
from pageflight.lowering.tensorrt_target import TensorRtTarget, collecting_log, import_flavor, package_of
from pageflight.models.config import DecoderConfig
from pageflight.models.decoder import decoder
from pageflight.models.sharding import Shard, Split
from pageflight.models.weights import EMBED, HEAD
from pageflight.quant.forms import WeightForm
from pageflight.quant.store import WeightStore

ENGINE_FOLDER = "segments"
TIMING_NAME = "timing.cache"
"""The full flavor's timings, as TensorRT wrote them: a build elsewhere for the same kind of GPU can begin with them."""
_SHOWN_ERRORS = 3

Forms = Mapping[str, WeightForm]


@dataclass(frozen=True, slots=True, eq=False)
class Networks:
    """The networks of a decoder by segment, in the order they run. `builder` must outlive them."""

    builder: Any
    log: Any
    segments: dict[str, Network]


def lower(
    trt: Any,
    config: DecoderConfig,
    forms: Forms,
    *,
    activations: str,
    num_positions: int,
    constants: StoredTensors | None = None,
    joint: Joint | None = None,
) -> Networks:
    """The definition as networks. With weights as inputs, `mid` is one for all layers; else each layer has its own.
    With `joint` they are those of one of several ranks, whose decoder and forms are given.

    Raises ManifestMismatch when weights are inputs and layers differ in the form of theirs, ConfigError when there is
    no builder here.
    """
    log = collecting_log(trt)
    try:
        builder = trt.Builder(log)
    except (TypeError, RuntimeError) as error:  # a builder that looks for its GPU, and finds none
        raise ConfigError(
            f"{trt.__name__} {trt.__version__} cannot build here: {'; '.join(log.errors) or error}; flavor 'full' needs"
            " the GPU that it builds for, flavor 'rtx' none"
        ) from None
    if constants is None:
        _check_layers(forms)
        config = replace(config, num_layers=min(2, config.num_layers))
    if HEAD not in forms:
        forms = {**forms, HEAD: forms[EMBED]}  # tied
    ops = TensorRtOps(
        trt,
        builder,
        config,
        forms,
        activations=activations,
        num_positions=num_positions,
        constants=constants,
        joint=joint,
    )
    networks = ops.finish(decoder(ops, config))
    every_layer = constants is not None
    kinds = _segments(config.num_layers, joint)
    names = [f"{kind}{layer}" if layer and every_layer else kind for kind, layer in kinds]
    return Networks(builder, log, dict(zip(names, networks, strict=True)))


def build_network(
    trt: Any,
    networks: Networks,
    name: str,
    target: TensorRtTarget,
    steps: tuple[Profile, ...],
    timings: TimingCache | None = None,
) -> memoryview:
    """The serialised engine of one segment. Raises ConfigError with the builder's own words when it cannot be built."""
    network, settings = networks.segments[name], networks.builder.create_builder_config()
    settings.clear_flag(trt.BuilderFlag.TF32)  # fp32 is what others are compared with: all of its bits count
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # RTX: what allocates by itself cannot be captured
        settings.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if timings is not None:
        timings.attach(settings)
    for step in steps:
        index = settings.add_optimization_profile(_profile(networks.builder, network, step))
        assert index >= 0, step
    if target.compute_capabilities:
        settings.num_compute_capabilities = len(target.compute_capabilities)
        for index, capability in enumerate(target.compute_capabilities):
            settings.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), index)
    networks.log.errors.clear()
    engine = networks.builder.build_serialized_network(network.definition, settings)
    if engine is None:
        reasons = "; ".join(networks.log.errors[:_SHOWN_ERRORS]) or "it gave no reason"
        if target.flavor == "full" and any(
            spec.name.endswith(".scale") and len(spec.shape) == 2 for spec in network.inputs
        ):
            reasons += "; scales of groups are inputs here, which not every TensorRT takes: --weights constant has none"
        raise ConfigError(f"{trt.__name__} {trt.__version__} cannot build segment {name!r}: {reasons}")
    if timings is not None:
        timings.take(settings)
    return memoryview(engine).cast("B")  # a copy of one with its weights inside would be large


def build_engines(
    folder: Path,
    config: DecoderConfig,
    store: WeightStore,
    target: TensorRtTarget,
    *,
    activations: str,
    num_positions: int,
    input_unit: int,
    advance: Callable[[int, int], None],
) -> EnginePlan:
    """Build all segments of the weights in `store` into `folder` and write their plan beside them.

    `input_unit`: see `models.sharding.Split`. `advance` counts segments, of all ranks. Raises ConfigError when the
    package is missing or cannot build one of them.
    """
    trt = import_flavor(target.flavor)
    steps = profiles(target.max_num_seqs, target.max_num_tokens)
    gpu = find_gpu() if target.flavor == "full" else None
    timings = None if gpu is None else TimingCache(timing_path(package_of(target.flavor), trt.__version__, gpu))
    (folder / ENGINE_FOLDER).mkdir()
    segments: dict[Hashable, Segment] = {}
    num_ranks = target.tensor_parallel
    for rank in range(num_ranks):
        tensors, rank_config, joint = rank_part(store, config, rank, input_unit, target)
        networks = lower(
            trt,
            rank_config,
            tensors.forms,
            activations=activations,
            num_positions=num_positions,
            constants=tensors if target.weights == "constant" else None,
            joint=joint,
        )
        for number, (name, network) in enumerate(networks.segments.items(), rank * len(networks.segments) + 1):
            inputs, outputs = tuple(network.inputs), tuple(network.outputs)
            # Without weights in them, engines of the same sizes are the same.
            kind = (name, rank) if target.weights == "constant" else (name, inputs, outputs)
            if kind not in segments:
                engine = build_network(trt, networks, name, target, steps, timings)
                file = f"{ENGINE_FOLDER}/{name}.rank{rank}.engine" if rank else f"{ENGINE_FOLDER}/{name}.engine"
                (folder / file).write_bytes(engine)
                segments[kind] = Segment(name=name, file=file, num_bytes=len(engine), inputs=inputs, outputs=outputs)
            if num_ranks > 1:
                segments[kind] = replace(segments[kind], ranks=(*segments[kind].ranks, rank))
            advance(number, num_ranks * len(networks.segments))
    if timings is not None:
        timings.save()
        (folder / TIMING_NAME).write_bytes(timings.data)
    plan = EnginePlan(
        flavor=target.flavor,
        compute_capabilities=target.compute_capabilities,
        activations=activations,
        weights=target.weights,
        profiles=steps,
        segments=tuple(segments.values()),
        runs=tuple(plan_runs(config.num_layers, {item.name: item for item in segments.values()}, store, joint)),
        tensor_parallel=num_ranks,
        collectives=target.collectives,
    )
    plan.write(folder)
    return plan


def rank_part(
    store: WeightStore, config: DecoderConfig, rank: int, input_unit: int, target: TensorRtTarget
) -> tuple[WeightStore | RankTensors, DecoderConfig, Joint | None]:
    """What is lowered for a rank: its weights, its decoder, and how it meets the others. Raises ConfigError, naming the
    numbers of ranks that work."""
    if target.tensor_parallel == 1:
        return store, config, None
    split = Split(config=config, shard=Shard(rank=rank, size=target.tensor_parallel), input_unit=input_unit)
    return RankTensors(store, split), split.rank_config, Joint.of(split, inside=target.collectives == "inside")


def plan_runs(
    num_layers: int, segments: Mapping[str, Segment], store: WeightStore, joint: Joint | None = None
) -> Iterator[Run]:
    """One step as executions of segments. The residual has two buffers, for no engine may write where it reads."""
    residual, num_attentions = 0, 0
    for kind, layer in _segments(num_layers, joint):
        segment = segments[kind if kind in segments else f"{kind}{layer}"]
        names = {"residual": f"residual.{residual}", "next_residual": f"residual.{1 - residual}"}
        names["part"] = names["residual"] if kind == "embed" else "sum"
        weights = [spec.name for spec in segment.inputs if spec.kind == "weight"]
        outputs = [spec.name for spec in segment.outputs]
        moving = [spec.name for spec in (*segment.inputs, *segment.outputs) if spec.kind in ("step", "activation")]
        yield Run(
            segment=segment.name,
            attention=num_attentions if "q" in outputs else -1,
            weights={weight: store.stored_name(stored_name(weight, num_attentions)) for weight in weights},
            buffers={name: names.get(name, name) for name in moving},
            summed=names["part"] if "part" in outputs else "",
        )
        num_attentions += "q" in outputs
        residual ^= "next_residual" in outputs


def _segments(num_layers: int, joint: Joint | None) -> Iterator[tuple[str, int]]:
    """The kinds of networks in the order they run, each with the layer that begins in it; 0 where there is one only."""
    if joint is None or joint.inside:
        yield "first", 0
        yield from (("mid", layer) for layer in range(1, num_layers))
    else:
        yield from (("embed", 0), ("first", 0))
        for layer in range(1, num_layers):
            yield from (("output", layer), ("mlp", layer), ("mid", layer))
        yield from (("last_output", 0), ("last_mlp", 0))
    yield "last", 0


def _check_layers(forms: Forms) -> None:
    """Raises ManifestMismatch for a weight that is stored in another form than that of the first layer."""
    for name, form in forms.items():
        if name.startswith("layers."):
            first = "layers.0." + name.split(".", 2)[2]
            if form != forms[first]:
                raise ManifestMismatch(
                    f"{name} is stored as {form}, {first} as {forms[first]}: layers that differ need weights=constant"
                )


def _profile(builder: Any, network: Network, step: Profile) -> Any:
    most = {TOKENS: step.max_tokens, ROWS: step.max_rows}
    least = {TOKENS: step.min_tokens, ROWS: 1}
    profile = builder.create_optimization_profile()
    for spec in network.inputs:
        if any(isinstance(extent, str) for extent in spec.shape):
            low, high = (
                tuple(sizes[extent] if isinstance(extent, str) else extent for extent in spec.shape)
                for sizes in (least, most)
            )
            profile.set_shape(spec.name, low, high, high)
    return profile
