"""TensorRT's segments on the card: whether they compute what torch computes, and how fast they are.

Without a GPU the networks are walked in torch where engines would run: that tries the checks, and proves no engine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pageflight.lowering.tensorrt_build import Networks, build_network
from pageflight.lowering.tensorrt_caches import RuntimeCache, TimingCache, timing_path
from pageflight.lowering.tensorrt_engines import STRATEGIES, Strategies, TensorRtSegments
from pageflight.lowering.tensorrt_gpu import find_gpu
from pageflight.lowering.tensorrt_lowering import TensorRtLowering
from pageflight.lowering.tensorrt_model import TYPES, Segments, load_weight
from pageflight.lowering.tensorrt_ops import stored_name
from pageflight.lowering.tensorrt_plan import ROWS, TOKENS, EnginePlan, Profile, Segment, TensorSpec, profiles
from pageflight.lowering.tensorrt_target import TensorRtTarget, package_of
from pageflight.models.config import DecoderConfig
from pageflight.models.rope import rope_tables
from pageflight.quant.forms import default_group_size, weight_forms
from perf.gpu_check.card import Card, Record
from perf.gpu_check.network_walk import TORCH_TYPES, Walk, tensor_of
from perf.gpu_check.tensorrt_flavors import Usable, lowered, spec_of, tiny, usable, walked
from perf.gpu_check.tensorrt_models import LAYER, SMALL, RandomTensors

CASES = ("fp32", "fp16", "bf16", "fp8", "fp8 static", "int8", "int8 static", "int4")
"""Precisions; `static` with scales of activations that a calibration would have found."""
BATCHES = (1, 8, 32, 128)
CHUNK = 2048
NUM_SEQS, NUM_TOKENS = 8, 64  # of the segments that are compared
BUDGET_S = 330.0
"""After this a part begins no other precision: the full flavor measures kernels while it builds, for minutes. It keeps
what it measured, so that the part gets further when it is run again."""
_LEAST_ERROR = {"fp32": 2e-5, "fp16": 4e-3, "bf16": 3e-2}
"""Relative errors that are no fault of anybody's, by the precision of the activations."""
_FACTOR = 3.0  # as far from float64 as torch in the same precision, or that much further: sums have another order


def segments(
    card: Card, folder: Path, form: str, cases: tuple[str, ...] = CASES, config: DecoderConfig | None = None
) -> Iterator[Record]:
    """Every segment in every precision beside the same network in float64, and in torch's own half precision."""
    config = config or (SMALL if card.is_gpu else tiny(card))
    steps = profiles(NUM_SEQS, NUM_TOKENS)
    for flavor, case in _in_time(card, cases):
        _, activations, weights = _weights_of(case, config)
        networks = lowered(flavor.trt, config, weights, activations, form)
        target = flavor.target(form, NUM_SEQS, NUM_TOKENS)
        place = folder / f"{flavor.flavor}-{case.replace(' ', '-')}"
        engines, build_s = _engines(card, flavor, networks, target, steps, activations, place)
        for index, (name, network) in enumerate(networks.segments.items()):
            walks = {wide: Walk(flavor.trt, network, card.device, wide) for wide in (torch.float64, None)}
            found = _compared(card, engines, walks, spec_of(networks, name), index, weights, config, activations)
            yield {"name": f"{flavor.flavor} {case} {form} {name}", **found, "build_s": build_s}


def _in_time(card: Card, cases: tuple[str, ...]) -> Iterator[tuple[Usable, str]]:
    """All flavors that take the card with all cases, until the time is up."""
    end_s = time.perf_counter() + BUDGET_S
    for flavor in usable(card):
        for case in cases:
            if time.perf_counter() < end_s:
                yield flavor, case
            else:
                print(f"  left out for want of time: {flavor.flavor} {case}", flush=True)


def _compared(
    card: Card,
    engines: Segments,
    walks: Mapping[torch.dtype | None, Walk],
    segment: Segment,
    index: int,
    weights: RandomTensors,
    config: DecoderConfig,
    activations: str,
) -> Record:
    """The worst output over decode and prefill sizes. Fails where the engine is further from float64 than it may be."""
    worst: Record = {"error": -1.0}
    for profile, num_tokens in ((0, 1), (2, 8), (3, 33)):
        given = _inputs(card, segment, index, weights, config, num_tokens)
        outputs = _outputs(card, segment, num_tokens)
        engines.run(segment.name, profile, {name: pair[0] for name, pair in given.items()}, outputs)
        wide = {name: pair[1] for name, pair in given.items()}
        right, torchs = walks[torch.float64](wide), walks[None](wide)
        for name, found in outputs.items():
            size = float(right[name].norm())
            error = float((found.double() - right[name]).norm()) / size
            reference = float((torchs[name].double() - right[name]).norm()) / size
            limit = max(_FACTOR * reference, _LEAST_ERROR[activations])
            assert error <= limit, (
                f"{segment.name}: {name} of {num_tokens} tokens: error {error:.2e}, at most {limit:.2e}"
            )
            if error > float(str(worst["error"])):
                largest = float((found.double() - right[name]).abs().max())
                worst = {"output": name, "tokens": num_tokens, "error": error, "torch": reference, "largest": largest}
    return worst


def layers(
    card: Card, folder: Path, form: str, cases: tuple[str, ...] = CASES, config: DecoderConfig | None = None
) -> Iterator[Record]:
    """One layer of Llama-3.1-8B from attention to attention: built, first run with and without kept kernels, timed."""
    config = config or (LAYER if card.is_gpu else tiny(card))
    batches, chunk = (BATCHES, CHUNK) if card.is_gpu else ((1,), 16)
    steps = profiles(max(batches), chunk)
    bandwidth = card.bandwidth()
    for flavor, case in _in_time(card, cases):
        _, activations, weights = _weights_of(case, config)
        networks = lowered(flavor.trt, config, weights, activations, form)
        name = list(networks.segments)[1]
        networks = replace(networks, segments={name: networks.segments[name]})
        target = flavor.target(form, max(batches), chunk)
        place = folder / f"{flavor.flavor}-{case.replace(' ', '-')}"
        engines, build_s = _engines(card, flavor, networks, target, steps, activations, place)
        segment = spec_of(networks, name)

        def start(strategies: Strategies) -> TensorRtSegments:
            plan = _plan(flavor, networks, target, steps, activations)  # noqa: B023
            return _started(card, flavor, plan, place, strategies)  # noqa: B023

        def timed(engines: Segments, index: int, num_tokens: int) -> float:
            return _timed(card, engines, segment, weights, config, index, num_tokens)  # noqa: B023

        record: Record = {"name": f"{flavor.flavor} {case} {form}", "build_s": build_s}
        record["engine_mb"] = round(sum(file.stat().st_size for file in place.glob("*.engine")) / 1e6, 1)
        record["first_ms"] = _first_run(card, engines, segment, weights, config)
        compiles = isinstance(engines, TensorRtSegments) and flavor.flavor == "rtx"
        if compiles:
            engines.save()
            record["first_kept_ms"] = _first_run(card, start(STRATEGIES), segment, weights, config)
        stored = sum(weights.tensor(item).nbytes for item in weights.layout if item.startswith("layers.1."))
        for batch in batches:
            seconds = timed(engines, _profile_of(steps, batch), batch)
            record[f"us_{batch}"] = round(seconds * 1e6, 1)
            record[f"of_bandwidth_{batch}"] = round(stored / seconds / bandwidth, 3)
        record[f"us_{chunk}"] = round(timed(engines, len(steps) - 1, chunk) * 1e6, 1)
        if compiles:  # is what was chosen right?
            others = start({"decode": "NONE", "prefill": "EAGER"})
            record["us_1_none"] = round(timed(others, 0, 1) * 1e6, 1)
            record[f"us_{chunk}_eager"] = round(timed(others, len(steps) - 1, chunk) * 1e6, 1)
        yield record


def _engines(
    card: Card,
    flavor: Usable,
    networks: Networks,
    target: TensorRtTarget,
    steps: tuple[Profile, ...],
    activations: str,
    folder: Path,
) -> tuple[Segments, float]:
    """All segments built into `folder` and loaded, and the seconds that building took; walked without a GPU."""
    if not card.is_gpu:
        return walked(flavor, networks), 0.0
    folder.mkdir()
    begin_s = time.perf_counter()
    timings = None
    if flavor.flavor == "full" and (gpu := find_gpu(card.device.index or 0)) is not None:
        timings = TimingCache(timing_path(package_of(flavor.flavor), flavor.trt.__version__, gpu))
    for name in networks.segments:
        engine = build_network(flavor.trt, networks, name, target, steps, timings)
        (folder / f"{name}.engine").write_bytes(engine)
    if timings is not None:
        timings.save()
    seconds = round(time.perf_counter() - begin_s, 2)
    return _started(card, flavor, _plan(flavor, networks, target, steps, activations), folder, STRATEGIES), seconds


def _plan(
    flavor: Usable, networks: Networks, target: TensorRtTarget, steps: tuple[Profile, ...], activations: str
) -> EnginePlan:
    return EnginePlan(
        flavor=flavor.flavor,
        compute_capabilities=target.compute_capabilities,
        activations=activations,
        weights=target.weights,
        profiles=steps,
        segments=tuple(spec_of(networks, name) for name in networks.segments),
        runs=(),
    )


def _started(card: Card, flavor: Usable, plan: EnginePlan, folder: Path, strategies: Strategies) -> TensorRtSegments:
    kernels = RuntimeCache(folder / "kernels") if flavor.flavor == "rtx" else None
    return TensorRtSegments(flavor.trt, folder, plan, card.device, kernels=kernels, strategies=strategies)


def _weights_of(case: str, config: DecoderConfig) -> tuple[str, str, RandomTensors]:
    """dtype, activations and weights of a case."""
    dtype, *kind = case.split()
    group_size = default_group_size(config, dtype)
    forms = weight_forms(config, dtype, group_size)
    static = [name for name, form in forms.items() if form.scales and name != "head"] if kind else []
    return dtype, TensorRtLowering().activations(dtype), RandomTensors(weight_forms(config, dtype, group_size, static))


def _inputs(
    card: Card, segment: Segment, index: int, weights: RandomTensors, config: DecoderConfig, num_tokens: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Every input of a segment twice: as an engine takes it, and as the walk does, which holds int4 unpacked."""
    half = config.head_dim // 2
    cosines, sines = (torch.from_numpy(t[:, :half].copy()) for t in rope_tables(config, config.max_positions))
    generator = torch.Generator().manual_seed(index)
    given: dict[str, tuple[Tensor, Tensor]] = {}
    for spec in segment.inputs:
        if spec.kind == "weight":
            name = stored_name(spec.name, index)
            shape = tuple(int(extent) for extent in spec.shape)
            unpacked = tensor_of(weights.tensor(name), spec.dtype, shape).to(card.device)
            given[spec.name] = (load_weight(weights, name, spec, card.device), unpacked)
            continue
        if spec.kind == "table":
            made = cosines if spec.name == "rope.cosines" else sines
        elif spec.kind == "step":
            most = {"ids": config.vocab_size, "positions": config.max_positions, "take": num_tokens}[spec.name]
            made = torch.randint(0, most, _sizes(spec, num_tokens), generator=generator, dtype=torch.int32)
        else:
            made = torch.randn(_sizes(spec, num_tokens), generator=generator).to(TORCH_TYPES[spec.dtype])
        made = made.to(card.device)
        given[spec.name] = (made, made)
    return given


def _outputs(card: Card, segment: Segment, num_tokens: int) -> dict[str, Tensor]:
    return {
        spec.name: torch.full(_sizes(spec, num_tokens), torch.nan, dtype=TYPES[spec.dtype], device=card.device)
        for spec in segment.outputs
    }


def _sizes(spec: TensorSpec, num_tokens: int) -> list[int]:
    known = {TOKENS: num_tokens, ROWS: min(num_tokens, NUM_SEQS)}
    return [known[extent] if isinstance(extent, str) else extent for extent in spec.shape]


def _first_run(card: Card, engines: Segments, segment: Segment, weights: RandomTensors, config: DecoderConfig) -> float:
    """Milliseconds of the first decode step of one row: contexts are made and, by RTX, kernels compiled."""
    given = {name: pair[0] for name, pair in _inputs(card, segment, 1, weights, config, 1).items()}
    outputs = _outputs(card, segment, 1)
    if card.is_gpu:
        torch.cuda.synchronize(card.device)
    begin_s = time.perf_counter()
    engines.run(segment.name, 0, given, outputs)
    if card.is_gpu:
        torch.cuda.synchronize(card.device)
    return round((time.perf_counter() - begin_s) * 1e3, 2)


def _timed(
    card: Card,
    engines: Segments,
    segment: Segment,
    weights: RandomTensors,
    config: DecoderConfig,
    profile: int,
    num_tokens: int,
) -> float:
    given = {name: pair[0] for name, pair in _inputs(card, segment, 1, weights, config, num_tokens).items()}
    outputs = _outputs(card, segment, num_tokens)
    return card.seconds(lambda: engines.run(segment.name, profile, given, outputs))


def _profile_of(steps: tuple[Profile, ...], num_tokens: int) -> int:
    return next(i for i, step in enumerate(steps) if step.min_tokens <= num_tokens <= step.max_tokens)
