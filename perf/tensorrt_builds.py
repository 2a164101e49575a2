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
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `perf` is not installed, and this may run as a script

from pageflight.lowering.tensorrt_build import build_network, lower
from pageflight.lowering.tensorrt_lowering import TensorRtLowering
from pageflight.lowering.tensorrt_plan import profiles
from pageflight.lowering.tensorrt_target import WEIGHTS, TensorRtTarget, import_flavor
from pageflight.models.safetensors_file import DTYPES
from pageflight.quant.forms import default_group_size, weight_forms
from pageflight_build.amounts import parse_capabilities
from perf import figures
from perf.gpu_check.tensorrt_models import LAYER, RandomTensors

PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "int8", "int4")
MAX_NUM_SEQS, MAX_NUM_TOKENS = 256, 8192


def measure(dtype: str, target: TensorRtTarget, repeat: int) -> figures.Record:
    """Build the segment of `dtype` and say what came of it."""
    trt = import_flavor(target.flavor)
    lowering = TensorRtLowering(target)
    lowering.check(LAYER, dtype, lowering.default_kv_dtype(dtype))
    group_size = default_group_size(LAYER, dtype)
    forms = weight_forms(LAYER, dtype, group_size)
    constants = RandomTensors(forms) if target.weights == "constant" else None
    networks = lower(
        trt,
        LAYER,
        forms,
        activations=lowering.activations(dtype),
        num_positions=LAYER.max_positions,
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
