"""The plan of TensorRT engines, carried out: segments walked in torch, attention by the reference between them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from perf.gpu_check.network_walk import TORCH_TYPES, Walk, tensor_of

from pageflight.lowering.base import StepInputs
from pageflight.lowering.communicator import Communicator
from pageflight.lowering.engine_dir import EngineDir
from pageflight.lowering.parallel_ops import all_logits, own_ids
from pageflight.lowering.tensorrt_build import lower, plan_runs, rank_part
from pageflight.lowering.tensorrt_plan import Segment
from pageflight.lowering.tensorrt_target import TensorRtTarget
from pageflight.lowering.torch_cache import BlockCache
from pageflight.lowering.torch_ops import EagerOps
from pageflight.models.rope import rope_tables
from pageflight.quant.sharding import ShardStore, input_unit


class WalkedModel:
    """A `CompiledModel` that computes what the networks of an engine say, as a runner would; or those of a rank."""

    block_size = 32

    def __init__(
        self,
        trt: Any,
        engine: EngineDir,
        *,
        activations: str,
        constant: bool = False,
        communicator: Communicator | None = None,
        collectives: str = "between",
    ) -> None:
        manifest, positions = engine.manifest, engine.manifest.max_model_len
        place = communicator.place if communicator else None
        target = TensorRtTarget(tensor_parallel=place.tensor_parallel if place else 1, collectives=collectives)
        unit = input_unit(manifest.dtype, manifest.quant_group_size)
        self._store, config, joint = rank_part(engine.weights, engine.config, place.rank if place else 0, unit, target)
        self.config, self.vocab_size, self._communicator = config, config.vocab_size, communicator
        self._vocabulary = engine.split(place.shard).vocabulary if place else slice(0, config.vocab_size)
        self._networks = lower(
            trt,
            config,
            self._store.forms,
            activations=activations,
            num_positions=positions,
            constants=self._store if constant else None,
            joint=joint,
        )
        self.segments = {
            name: Segment(name=name, file="", num_bytes=0, inputs=tuple(n.inputs), outputs=tuple(n.outputs))
            for name, n in self._networks.segments.items()
        }
        all_reduce = communicator.all_reduce if communicator else None
        self.walks = {n: Walk(trt, network, all_reduce=all_reduce) for n, network in self._networks.segments.items()}
        self.runs = tuple(plan_runs(config.num_layers, self.segments, engine.weights, joint))
        self._last_attention = next(i for i, run in enumerate(self.runs) if run.attention == config.num_layers - 1)
        half = config.head_dim // 2
        self._tables = {
            f"rope.{name}": torch.from_numpy(table[:, :half].copy())
            for name, table in zip(("cosines", "sines"), rope_tables(config, positions), strict=True)
        }
        weights = ShardStore(engine.weights, engine.split(place.shard)) if place else engine.weights
        self._attention = EagerOps(config, weights, positions, TORCH_TYPES[activations])
        self._kv_dtype = activations
        self._inputs: StepInputs

    def allocate(self, num_blocks: int, num_host_blocks: int = 0) -> None:
        self._attention.cache = BlockCache(self.config, self._kv_dtype, num_blocks, self.block_size, num_host_blocks)

    def start(self, inputs: StepInputs) -> None:
        self._inputs = inputs

    def wait(self) -> np.ndarray:
        return self.forward(self._inputs).numpy()

    @torch.inference_mode()
    def forward(self, inputs: StepInputs, x: None = None) -> torch.Tensor:
        self._inputs = inputs
        steps = {"ids": self._inputs.ids_T, "positions": self._inputs.positions_T, "take": self._inputs.take_L}
        buffers = {name: torch.from_numpy(array.astype(np.int32)) for name, array in steps.items()}
        if self._communicator is not None:
            buffers["ids"], elsewhere = own_ids(buffers["ids"], self._vocabulary)
            buffers["here"] = (~elsewhere)[:, None].to(TORCH_TYPES[self._kv_dtype])
        self._attention.prepare(self._inputs, self.block_size)
        for index, run in enumerate(self.runs):
            if index > self._last_attention and not len(inputs.take_L):
                return torch.empty(0, self.vocab_size)
            segment = self.segments[run.segment]
            given = {}
            for spec in segment.inputs:
                if spec.kind == "weight":
                    given[spec.name] = tensor_of(self._store.tensor(run.weights[spec.name]), spec.dtype, spec.shape)
                else:
                    given[spec.name] = self._tables.get(spec.name, buffers.get(run.buffers.get(spec.name, "")))
            for name, value in self.walks[run.segment](given).items():
                buffers[run.buffers[name]] = value
            if run.summed:
                buffers[run.summed] = self._communicator.all_reduce(buffers[run.summed])
            if run.attention >= 0:
                q, k, v = buffers["q"], buffers["k"], buffers["v"]
                buffers["attended"] = self._attention.paged_attention(run.attention, q, k, v)
        logits = buffers["logits"]
        return logits if self._communicator is None else all_logits(self._communicator, logits, self.vocab_size)

    def copy_blocks(self, sources: np.ndarray, targets: np.ndarray) -> None:
        assert self._attention.cache is not None
        self._attention.cache.copy(*(torch.from_numpy(ids.astype(np.int64)) for ids in (sources, targets)))

    def close(self) -> None: ...
