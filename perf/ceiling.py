"""What this machine allows at best: measured memory bandwidth and matrix product rate, and the tokens/s that follow.

    python -m perf.ceiling --checkpoint CHECKPOINT

Decoding reads all weights once in every step, so bytes of weights ÷ bandwidth bounds a step from below; every token of
prompt and output is multiplied with all weights, so FLOP per token ÷ product rate bounds the rest. Attention, K/V
traffic, sampling and all host work count as nothing: a ceiling, not a goal.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import numpy as np
import openvino as ov  # type: ignore[import-untyped]
import typer
from openvino import opset13 as opset

from perf import figures
from perf.workload import DEFAULT_PLAN, Workload

SCAN_BYTES = 256 << 20  # each thread's share: many times any cache
PRODUCT_SIZE = 2048


class WeightType(str, Enum):
    """How weights lie in memory, and in what they are multiplied."""

    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"  # weights and, quantised while running, activations

    @property
    def num_bytes(self) -> int:
        return {"fp32": 4, "bf16": 2, "int8": 1}[self.value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Measured limits."""

    num_threads: int
    read_bytes_per_s: float
    flops_per_s: dict[WeightType, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What one step reads and one token is multiplied with."""

    name: str
    num_layer_parameters: int  # matrices of all layers
    num_head_parameters: int

    @classmethod
    def of_checkpoint(cls, folder: Path) -> Weights:
        """From a Llama's config.json. Norms and biases are too small to matter."""
        config = json.loads((folder / "config.json").read_text())
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        kv_heads = config.get("num_key_value_heads") or heads
        attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
        layer = attention + 3 * hidden * config["intermediate_size"]
        return cls(
            name=folder.name,
            num_layer_parameters=config["num_hidden_layers"] * layer,
            num_head_parameters=config["vocab_size"] * hidden,
        )

    def step_bytes(self, weight_type: WeightType) -> int:
        """With every weight in the same type, the head too."""
        return (self.num_layer_parameters + self.num_head_parameters) * weight_type.num_bytes


def tokens_per_s(machine: Machine, weights: Weights, weight_type: WeightType, workload: Workload) -> float:
    """Output tokens/s that nothing can exceed; the shared part of prompts is computed once."""
    rate = machine.flops_per_s[weight_type]
    read_s = weights.step_bytes(weight_type) / machine.read_bytes_per_s / workload.concurrency
    output_s = max(read_s, 2 * (weights.num_layer_parameters + weights.num_head_parameters) / rate)
    prompt_tokens = workload.num_own + workload.num_shared / workload.num_requests
    prompt_s = prompt_tokens * 2 * weights.num_layer_parameters / rate  # the head sees only the last of them
    return workload.num_output / (output_s * workload.num_output + prompt_s)


def best_s(work: Callable[[], object], *, repeats: int) -> float:
    """The shortest of several runs, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - started_s)
    return min(times)


def measure_read(num_threads: int, *, repeats: int = 8) -> float:
    """Bytes/s at which all threads together read memory, each an array of its own."""
    arrays = [np.ones(SCAN_BYTES // 4, np.float32) for _ in range(num_threads)]

    def scan() -> None:
        threads = [threading.Thread(target=array.max) for array in arrays]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return num_threads * SCAN_BYTES / best_s(scan, repeats=repeats)


def measure_product(num_threads: int, weight_type: WeightType, *, size: int = PRODUCT_SIZE, repeats: int = 8) -> float:
    """FLOP/s of a size³ matrix product in OpenVINO."""
    values = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    settings: dict[str, object] = {
        "INFERENCE_PRECISION_HINT": "f32" if weight_type is WeightType.fp32 else "bf16",
        "INFERENCE_NUM_THREADS": num_threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    if weight_type is WeightType.int8:
        scale = np.abs(values).max(axis=1, keepdims=True) / 127
        stored = opset.constant(np.round(values / scale).astype(np.int8))
        weight = opset.multiply(opset.convert(stored, "f32"), opset.constant(scale))
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 64
    else:
        weight = opset.constant(values)
    x = opset.parameter([-1, size], ov.Type.f32)
    model = ov.Model([opset.matmul(x, weight, False, True)], [x], "product")
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(values))
    return 2 * size**3 / best_s(request.infer, repeats=repeats)


def measure(num_threads: int, weight_types: list[WeightType]) -> Machine:
    """Takes a few seconds and wants the machine for itself."""
    return Machine(
        num_threads=num_threads,
        read_bytes_per_s=measure_read(num_threads),
        flops_per_s={weight_type: measure_product(num_threads, weight_type) for weight_type in weight_types},
    )


def main(
    checkpoint: Annotated[Path, typer.Option(help="Folder whose config.json tells the shape.")],
    plan: Annotated[str, typer.Option(help="kind:concurrency:requests:prompt:output …")] = " ".join(DEFAULT_PLAN),
    threads: Annotated[int, typer.Option(min=0, help="0: all cores.")] = 0,
    out: Annotated[Path, typer.Option(help="The file that lines are appended to.")] = Path(
        "perf/results/ceiling.jsonl"
    ),
) -> None:
    """Measure this machine and print the ceiling of every workload, one line of JSON each."""
    machine = measure(threads or len(os.sched_getaffinity(0)), [WeightType.bf16, WeightType.int8])
    weights = Weights.of_checkpoint(checkpoint)
    for weight_type in machine.flops_per_s:
        for item in plan.split():
            workload = Workload.parse(item)
            record: figures.Record = {
                "label": f"ceiling-{weight_type.value}",
                "model": weights.name,
                "kind": workload.kind.value,
                "conc": workload.concurrency,
                "nreq": workload.num_requests,
                "prompt": workload.prompt,
                "output": workload.num_output,
                "tok_s": round(tokens_per_s(machine, weights, weight_type, workload), 1),
                "read_gb_s": round(machine.read_bytes_per_s / 1e9, 1),
                "gflop_s": round(machine.flops_per_s[weight_type] / 1e9),
                "step_mb": round(weights.step_bytes(weight_type) / 1e6, 1),
                "threads": machine.num_threads,
            } | figures.machine()
            print(json.dumps(record), flush=True)
            figures.append(out, record)


if __name__ == "__main__":
    typer.run(main)
