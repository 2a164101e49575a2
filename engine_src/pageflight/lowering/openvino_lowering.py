"""The OpenVINO lowering: the decoder as a graph for the CPU plugin, rebuilt and compiled at every start."""

from __future__ import annotations

import os

os.environ.setdefault("OPENVINO_TELEMETRY", "0")

import platform
from pathlib import Path
from typing import Any

import openvino as ov  # type: ignore[import-untyped]

from pageflight.lowering.base import CompiledModel
from pageflight.lowering.engine_dir import Verification, compare_fingerprints, open_engine
from pageflight.lowering.openvino_model import OpenVinoModel
from pageflight.lowering.openvino_ops import GraphOps
from pageflight.models.decoder import decoder

_KV = {"fp32": "f32", "bf16": "bf16", "u8": "u8"}


class OpenVinoLowering:
    """Engines for the CPU."""

    name = "openvino"

    def __init__(self, *, exact: bool = False, extra: dict[str, Any] | None = None) -> None:
        self._exact = exact
        self._extra = extra or {}

    def fingerprint(self, dtype: str) -> dict[str, str]:
        return {"openvino": ov.get_version(), "machine": platform.machine()}

    def load(self, engine_dir: Path, *, num_threads: int) -> CompiledModel:
        engine = open_engine(engine_dir, self.name)
        compare_fingerprints(engine_dir, engine.manifest.fingerprint, self.fingerprint(engine.manifest.dtype))
        verification = Verification(engine)
        ops = GraphOps(engine.config, engine.weights, engine.manifest.max_model_len)
        model = ops.model(decoder(ops, engine.config))
        dtype = engine.manifest.dtype
        settings = {
            "INFERENCE_PRECISION_HINT": "f32" if self._exact or dtype == "fp32" else "bf16",
            "KV_CACHE_PRECISION": _KV[engine.manifest.kv_dtype],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": num_threads,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 64 if dtype == "int8" and not self._exact else 0,
            **self._extra,
        }
        compiled = ov.Core().compile_model(model, "CPU", settings)
        verification.finish()
        return OpenVinoModel(compiled, engine.config.num_layers, engine.config.vocab_size, ops.keep)
