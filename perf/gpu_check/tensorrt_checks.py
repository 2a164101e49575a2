"""Whether the TensorRT packages at hand take this card, and what a segment of theirs does on it."""

from __future__ import annotations

import importlib
from types import ModuleType

from perf.gpu_check.card import Card, Record

PACKAGES = {"rtx": "tensorrt_rtx", "full": "tensorrt"}


def tensorrt(card: Card) -> list[Record]:
    """A plain answer for every flavor; a flavor that is not installed is no failure."""
    return [{"name": f"tensorrt {flavor}", **_tried(package, card)} for flavor, package in PACKAGES.items()]


def _tried(package: str, card: Card) -> Record:
    try:
        trt = importlib.import_module(package)
    except (ImportError, OSError) as error:
        return {"installed": False, "reason": str(error)}
    record: Record = {"installed": True, "version": trt.__version__}
    if not card.is_gpu:
        return {**record, "takes_card": None, "reason": "no GPU"}
    try:
        return {**record, **_built_and_loaded(trt, card)}
    except (RuntimeError, TypeError, AttributeError) as error:  # AttributeError: it has no name for the capability
        return {**record, "takes_card": False, "reason": str(error)}


def _built_and_loaded(trt: ModuleType, card: Card) -> Record:
    """A product of two matrices: built for this card, loaded, and found to be valid there."""
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    x = network.add_input("x", trt.float16, (16, 64))
    weight = network.add_input("weight", trt.float16, (32, 64))
    product = network.add_matrix_multiply(x, trt.MatrixOperation.NONE, weight, trt.MatrixOperation.TRANSPOSE)
    product.get_output(0).name = "y"
    network.mark_output(product.get_output(0))
    config = builder.create_builder_config()
    if hasattr(config, "num_compute_capabilities"):
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{card.capability}"), 0)
    serialised = builder.build_serialized_network(network, config)
    if serialised is None:
        return {"takes_card": False, "reason": f"the builder refuses capability {card.capability}"}
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(serialised)
    if engine is None:
        return {"takes_card": False, "reason": "the engine cannot be loaded"}
    return {"takes_card": True, "engine_bytes": serialised.nbytes}
