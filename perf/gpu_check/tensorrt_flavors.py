"""Which flavors of TensorRT take the card, and their networks, walked where no engine can run."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pageflight.lowering.tensorrt_build import Networks, lower
from pageflight.lowering.tensorrt_plan import Segment
from pageflight.lowering.tensorrt_target import FLAVORS, TensorRtTarget, known_capabilities, package_of
from pageflight.models.config import DecoderConfig
from perf.gpu_check.card import Card, Record
from perf.gpu_check.network_walk import Walk, WalkedSegments
from perf.gpu_check.tensorrt_models import SMALL, RandomTensors


@dataclass(frozen=True, slots=True)
class Usable:
    """A flavor that takes the card, and what to build for."""

    flavor: str
    trt: Any
    capabilities: tuple[int, ...]

    def target(self, weights: str, max_num_seqs: int, max_num_tokens: int) -> TensorRtTarget:
        return TensorRtTarget(
            flavor=self.flavor,
            compute_capabilities=self.capabilities,
            weights=weights,
            max_num_seqs=max_num_seqs,
            max_num_tokens=max_num_tokens,
        )


def usable(card: Card) -> Iterator[Usable]:
    """The flavors that take the card; without a GPU those whose networks can be made, to be walked."""
    for flavor in FLAVORS:
        record, trt = tried(flavor, card)
        if trt is not None and (record["takes_card"] or not card.is_gpu):
            known = card.is_gpu and flavor == "rtx" and card.capability in known_capabilities(trt)
            yield Usable(flavor, trt, (card.capability,) if known else ())


def tried(flavor: str, card: Card) -> tuple[Record, Any]:
    """What a flavor says to this card, and its module if it is installed."""
    try:
        trt = importlib.import_module(package_of(flavor))
    except (ImportError, OSError) as error:
        return {"installed": False, "takes_card": False, "reason": str(error)}, None
    record: Record = {"installed": True, "version": trt.__version__}
    if flavor == "rtx":
        record["builds_for"] = ",".join(map(str, known_capabilities(trt)))
    if not card.is_gpu:
        return {**record, "takes_card": None, "reason": "no GPU"}, trt
    log = trt.Logger(trt.Logger.ERROR)
    try:
        return {**record, **_loaded(trt, log, card, flavor)}, trt
    except (RuntimeError, TypeError, AttributeError) as error:  # the bindings do not say which
        return {**record, "takes_card": False, "reason": str(error)}, trt


def _loaded(trt: Any, log: Any, card: Card, flavor: str) -> Record:
    """A product of two matrices: built for this card, or for all that the flavor names, and loaded."""
    builder = trt.Builder(log)
    network = builder.create_network(0)
    x = network.add_input("x", trt.float16, (16, 64))
    weight = network.add_input("weight", trt.float16, (32, 64))
    product = network.add_matrix_multiply(x, trt.MatrixOperation.NONE, weight, trt.MatrixOperation.TRANSPOSE)
    product.get_output(0).name = "y"
    network.mark_output(product.get_output(0))
    config = builder.create_builder_config()
    named = flavor == "full" or card.capability in known_capabilities(trt)
    if flavor == "rtx" and named:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{card.capability}"), 0)
    record: Record = {"names_card": named}
    serialised = builder.build_serialized_network(network, config)
    if serialised is None:
        return {**record, "takes_card": False, "reason": "the builder refuses"}
    runtime = trt.Runtime(log)
    if hasattr(runtime, "get_engine_validity"):
        validity, diagnostics = runtime.get_engine_validity(bytes(serialised))
        record |= {"validity": validity.name, "diagnostics": int(diagnostics)}
    if runtime.deserialize_cuda_engine(serialised) is None:
        return {**record, "takes_card": False, "reason": "the engine cannot be loaded"}
    return {**record, "takes_card": True, "reason": "an engine was built and loaded"}


def walked(flavor: Usable, networks: Networks) -> WalkedSegments:
    walks = {name: Walk(flavor.trt, network) for name, network in networks.segments.items()}
    return WalkedSegments(walks, {name: spec_of(networks, name) for name in networks.segments})


def lowered(trt: Any, config: DecoderConfig, weights: RandomTensors, activations: str, form: str) -> Networks:
    constants = weights if form == "constant" else None
    positions = config.max_positions
    return lower(trt, config, weights.forms, activations=activations, num_positions=positions, constants=constants)


def spec_of(networks: Networks, name: str) -> Segment:
    network = networks.segments[name]
    inputs, outputs = tuple(network.inputs), tuple(network.outputs)
    return Segment(name=name, file=f"{name}.engine", num_bytes=0, inputs=inputs, outputs=outputs)


def tiny(card: Card) -> DecoderConfig:
    """A model of two layers; on a processor, where everything is interpreted, the least that takes all forms."""
    if card.is_gpu:
        return replace(SMALL, vocab_size=96, max_positions=128, hidden_size=256, num_heads=4, head_dim=64)
    return replace(
        SMALL,
        vocab_size=96,
        max_positions=128,
        hidden_size=64,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        intermediate_size=128,
    )


def in_folder(check: Callable[..., Iterator[Record]], card: Card, *arguments: Any) -> Iterator[Record]:
    """Run a check that wants a folder in one of its own, which goes afterwards.

    One that finds nothing to check leaves a record that says so, with what every flavor says to this card.
    """
    has_checked = False
    with tempfile.TemporaryDirectory() as name:
        for record in check(card, Path(name), *arguments):
            has_checked = True
            yield record
    if not has_checked:
        reasons = (f"{flavor}: {tried(flavor, card)[0]['reason']}" for flavor in FLAVORS)
        yield {"name": check.__name__, "skipped": "; ".join(reasons)}
