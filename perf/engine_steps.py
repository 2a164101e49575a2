"""Step times of one engine without scheduler or server, beside what the machine allows.

    python -m perf.engine_steps CHECKPOINT [--dtype bf16] [--kv-dtype bf16] [--lowering openvino] [--threads N]

Prints the ceiling first (memory read rate, matrix product rate), then the time of every step shape, then one JSON line.
Decode at batch 1 is bound by reading the weights once; a prompt chunk by its multiplications.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from pageflight.core.manifest import EngineManifest, FileRecord
from pageflight.lowering import registry
from pageflight.lowering.base import CompiledModel, Lowering, StepInputs
from pageflight.models.checkpoint import open_checkpoint
from pageflight.models.config import DecoderConfig
from pageflight.quant.convert import convert
from perf.ceiling import WeightType, measure

CONTEXT = 200
CHUNK = 512
BATCHES = (1, 8, 32, 128)


def build(args: argparse.Namespace, lowering: Lowering, folder: Path) -> DecoderConfig:
    """An engine directory of the checkpoint in the asked precision."""
    config, checkpoint = open_checkpoint(args.checkpoint)
    path = folder / "model.safetensors"
    made = convert(checkpoint, config, path, dtype=args.dtype, group_size=args.group_size)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    EngineManifest(
        name=args.checkpoint.name,
        family=config.family,
        lowering=lowering.name,
        dtype=args.dtype,
        kv_dtype=args.kv_dtype,
        quant_group_size=args.group_size,
        block_size=lowering.block_size,
        max_model_len=min(config.max_positions, 4096),
        vocab_size=config.vocab_size,
        model=config.to_json(),
        fingerprint=lowering.fingerprint(args.dtype),
        files=(FileRecord(path=path.name, num_bytes=made.num_bytes, sha256=digest),),
    ).write(folder)
    return config


def step_inputs(model: CompiledModel, past: int, new: int, batch: int) -> StepInputs:
    """`batch` sequences with `past` cached tokens and `new` ones each, every one over its own blocks."""
    blocks = -(-(past + new) // model.block_size)
    begins = np.arange(batch + 1, dtype=np.int32)
    return StepInputs(
        ids_T=np.random.default_rng(0).integers(0, model.vocab_size, batch * new),
        positions_T=np.tile(np.arange(past, past + new, dtype=np.int64), batch),
        past_lens_S=np.full(batch, past, np.int32),
        token_begins=begins * np.int32(new),
        block_indices_N=np.arange(batch * blocks, dtype=np.int32),
        block_begins=begins * np.int32(blocks),
        max_context_len=past + new,
        take_L=np.arange(batch, dtype=np.int64) * new + new - 1,
    )


def median_ms(model: CompiledModel, inputs: StepInputs, seconds: float) -> float:
    """Milliseconds of a step, the median of as many as fit into `seconds` (5 at least)."""

    def run() -> None:
        model.start(inputs)
        model.wait()

    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return float(np.median(times)) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--lowering", default="openvino", choices=registry.NAMES)
    parser.add_argument("--dtype", default="bf16", choices=[kind.value for kind in WeightType])
    parser.add_argument("--kv-dtype", default="")
    parser.add_argument("--group-size", type=int, default=0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=2.0, help="time given to each step shape")
    args = parser.parse_args()
    lowering = registry.get(args.lowering)
    args.kv_dtype = args.kv_dtype or lowering.default_kv_dtype(args.dtype)

    kind = WeightType(args.dtype)
    machine = measure(args.threads, [kind])
    read_rate, product_rate = machine.read_bytes_per_s, machine.flops_per_s[kind]
    print(f"machine: reads {read_rate / 1e9:.1f} GB/s, multiplies {product_rate / 1e9:.0f} GFLOP/s")
    with tempfile.TemporaryDirectory() as name:
        config = build(args, lowering, Path(name))
        begin = time.perf_counter()
        model = lowering.load(Path(name), num_threads=args.threads)
        load_s = time.perf_counter() - begin
    streamed = config.num_parameters - (0 if config.tied_head else config.vocab_size * config.hidden_size)
    bound_1_ms = streamed * kind.num_bytes / read_rate * 1e3
    per_token = 2 * (streamed - config.vocab_size * config.hidden_size)
    bound_chunk_ms = per_token * CHUNK / product_rate * 1e3
    print(f"ceiling: batch 1 {bound_1_ms:.2f} ms, prompt chunk of {CHUNK} {bound_chunk_ms:.1f} ms")
    print(f"loaded in {load_s:.2f} s")
    model.allocate(max(BATCHES) * -(-(CONTEXT + 1) // model.block_size))
    steps = {
        f"decode_{batch}": median_ms(model, step_inputs(model, CONTEXT, 1, batch), args.seconds) for batch in BATCHES
    }
    steps[f"prefill_{CHUNK}"] = median_ms(model, step_inputs(model, 0, CHUNK, 1), args.seconds)
    for shape, value in steps.items():
        print(f"{shape:>12} {value:9.2f} ms")
    record = {
        "benchmark": "engine_steps",
        "checkpoint": args.checkpoint.name,
        "lowering": args.lowering,
        "dtype": args.dtype,
        "kv_dtype": args.kv_dtype,
        "group_size": args.group_size,
        "threads": args.threads,
        "context": CONTEXT,
        "load_s": round(load_s, 3),
        "kv_bytes_per_block": model.kv_bytes_per_block,
        "read_gb_per_s": round(read_rate / 1e9, 1),
        "gemm_gflop_per_s": round(product_rate / 1e9),
        "ms": {shape: round(value, 3) for shape, value in steps.items()},
        "fraction_of_ceiling": {
            "decode_1": round(bound_1_ms / steps["decode_1"], 3),
            f"prefill_{CHUNK}": round(bound_chunk_ms / steps[f"prefill_{CHUNK}"], 3),
        },
    }
    model.close()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
