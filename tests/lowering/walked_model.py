"""The plan of TensorRT engines, carried out: segments walked in torch, attention by the reference between them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from perf.gpu_check.network_walk import TORCH_TYPES, Walk, tensor_of

from pageflight.lowering.base import StepInputs
from pageflight.lowering.engine_dir import EngineDir
from pageflight.lowering.tensorrt_build import lower, plan_runs
from pageflight.lowering.tensorrt_plan import Segment
from pageflight.lowering.torch_cache import BlockCache
from pageflight.lowering.torch_ops import EagerOps
from pageflight.models.rope import rope_tables


class WalkedModel:
    """A `CompiledModel` that computes what the networks of an engine say, as a runner would."""

    block_size = 32

    def __init__(self, trt: Any, engine: EngineDir, *, activations: str, constant: bool = False) -> None:
        config, store = engine.config, engine.weights
        positions = engine.manifest.max_model_len
        self.config, self.vocab_size, self._store = config, config.vocab_size, store
        self._networks = lower(
            trt,
            config,
            store.forms,
            activations=activations,
            num_positions=positions,
            constants=store if constant else None,
        )
        self.segments = {
            name: Segment(name=name, file="", num_bytes=0, inputs=tuple(n.inputs), outputs=tuple(n.outputs))
            for name, n in self._networks.segments.items()
        }
        self.walks = {name: Walk(trt, network) for name, network in self._networks.segments.items()}
        self.runs = tuple(plan_runs(config.num_layers, self.segments, store))
        half = config.head_dim // 2
        self._tables = {
            f"rope.{name}": torch.from_numpy(table[:, :half].copy())
            for name, table in zip(("cosines", "sines"), rope_tables(config, positions), strict=True)
        }
        self._attention = EagerOps(config, store, positions, TORCH_TYPES[activations])
        self._kv_dtype = activations
        self._inputs: StepInputs

    def allocate(self, num_blocks: int, num_host_blocks: int = 0) -> None:
        self._attention.cache = BlockCache(self.config, self._kv_dtype, num_blocks, self.block_size, num_host_blocks)

    def start(self, inputs: StepInputs) -> None:
        self._inputs = inputs

    @torch.inference_mode()
    def wait(self) -> np.ndarray:
        steps = {"ids": self._inputs.ids_T, "positions": self._inputs.positions_T, "take": self._inputs.take_L}
        buffers = {name: torch.from_numpy(array.astype(np.int32)) for name, array in steps.items()}
        self._attention.prepare(self._inputs, self.block_size)
        for run in self.runs:
            segment = self.segments[run.segment]
            given = {}
            for spec in segment.inputs:
                if spec.kind == "weight":
                    given[spec.name] = tensor_of(self._store.tensor(run.weights[spec.name]), spec.dtype, spec.shape)
                else:
                    given[spec.name] = self._tables.get(spec.name, buffers.get(run.buffers.get(spec.name, "")))
            for name, value in self.walks[run.segment](given).items():
                buffers[run.buffers[name]] = value
            if run.attention >= 0:
                q, k, v = buffers["q"], buffers["k"], buffers["v"]
                buffers["attended"] = self._attention.paged_attention(run.attention, q, k, v)
        return buffers["logits"].numpy()

    def copy_blocks(self, sources: np.ndarray, targets: np.ndarray) -> None:
        assert self._attention.cache is not None
        self._attention.cache.copy(*(torch.from_numpy(ids.astype(np.int64)) for ids in (sources, targets)))

    def close(self) -> None: ...
