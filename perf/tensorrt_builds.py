"""Sizes and build times of TensorRT engines, by precision: one segment between two attentions of Llama-3.1-8B's shape.

    python -m perf.tensorrt_builds [--compute-capability 89,120] [--repeat 2]

Needs no GPU: the RTX flavor builds without one. `engine_mb` beside `weights_mb`, the weights that the segment
multiplies by: with `weights` constant they are in the engine, which cannot be smaller; with `weights` input they are
not. `build_s` is the least of `--repeat` builds, from the finished network to serialised bytes. Weights are random.
Prints one JSON line per precision and form.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `perf` is not installed, and this may run as a script

from pageflight.lowering.tensorrt_build import build_network, lower
from pageflight.lowering.tensorrt_lowering import TensorRtLowering
from pageflight.lowering.tensorrt_plan import profiles
from pageflight.lowering.tensorrt_target import WEIGHTS, TensorRtTarget, import_flavor
from pageflight.models.config import DecoderConfig
from pageflight.models.safetensors_file import DTYPES
from pageflight.quant.forms import WeightForm, default_group_size, weight_forms
from pageflight_build.amounts import parse_capabilities
from perf import figures

LLAMA_8B = DecoderConfig(
    family="llama",
    vocab_size=256,  # of no account between two attentions; 128,256 would be 1 GB of tables here
    hidden_size=4096,
    num_layers=2,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    max_positions=8192,
    rms_norm_eps=1e-5,
)
PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "int8", "int4")
MAX_NUM_SEQS, MAX_NUM_TOKENS = 256, 8192


class RandomWeights:
    """Made when they are asked for: repeated noise, for the builder looks at sizes."""

    def __init__(self, forms: Mapping[str, WeightForm]) -> None:
        self._layout = {name: entry for key, form in forms.items() for name, entry in form.tensors(key).items()}
        random = np.random.default_rng(0)
        self._codes = random.integers(0, 0x7F, 1 << 20, dtype=np.uint8)  # no NaN in any format
        self._numbers = random.uniform(0.01, 0.02, 1 << 20).astype(np.float32)

    def tensor(self, name: str) -> NDArray[Any]:
        dtype, shape = self._layout[name]
        if dtype == "BF16":
            source: NDArray[Any] = self._numbers.view(np.uint16)[1::2]
        else:
            source = self._numbers if dtype in ("F32", "F16") else self._codes
        return np.resize(source.astype(DTYPES[dtype]), shape)


def measure(dtype: str, target: TensorRtTarget, repeat: int) -> figures.Record:
    """Build the segment of `dtype` and say what came of it."""
    trt = import_flavor(target.flavor)
    lowering = TensorRtLowering(target)
    lowering.check(LLAMA_8B, dtype, lowering.default_kv_dtype(dtype))
    group_size = default_group_size(LLAMA_8B, dtype)
    forms = weight_forms(LLAMA_8B, dtype, group_size)
    constants = RandomWeights(forms) if target.weights == "constant" else None
    networks = lower(
        trt,
        LLAMA_8B,
        forms,
        activations=lowering.activations(dtype),
        num_positions=LLAMA_8B.max_positions,
        constants=constants,
    )
    steps, name = profiles(target.max_num_seqs, target.max_num_tokens), list(networks.segments)[1]
    times, size = [], 0
    for _ in range(repeat):
        started = time.perf_counter()
        size = len(build_network(trt, networks, name, target, steps))
        times.append(time.perf_counter() - started)
    layer = [form for key, form in forms.items() if key.startswith("layers.0.")]
    stored = [entry for form in layer for entry in form.tensors("w").values()]
    num_bytes = sum(DTYPES[kind].itemsize * int(np.prod(shape)) for kind, shape in stored)
    return {
        "benchmark": "tensorrt_builds",
        "model": "Llama-3.1-8B, one mid segment",
        "dtype": dtype,
        "group_size": group_size,
        "activations": lowering.activations(dtype),
        "weights": target.weights,
        "weights_mb": round(num_bytes / 1e6, 1),
        "engine_mb": round(size / 1e6, 2),
        "build_s": round(min(times), 2),
        "profiles": len(steps),
        "compute_capabilities": list(target.compute_capabilities),
        "package": f"{trt.__name__} {trt.__version__}",
        **figures.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default=",".join(PRECISIONS), help="precisions, separated by commas")
    parser.add_argument("--weights", default=",".join(WEIGHTS), help="input, constant or both")
    parser.add_argument("--compute-capability", default="89,120")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--out", type=Path, help="append the lines here too")
    args = parser.parse_args()
    for weights in args.weights.split(","):
        target = TensorRtTarget(
            compute_capabilities=parse_capabilities(args.compute_capability),
            weights=weights,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_tokens=MAX_NUM_TOKENS,
        )
        for dtype in args.dtype.split(","):
            record = measure(dtype, target, args.repeat)
            print(json.dumps(record), flush=True)
            if args.out:
                figures.append(args.out, record)


if __name__ == "__main__":
    main()
