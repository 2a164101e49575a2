"""A decoder loaded onto a GPU: weights, blocks, and passes over them. Two make one: by kernels, or by TensorRT.

Shapes as in `lowering.device_blocks`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pageflight.lowering.communicator import Communicator
from pageflight.lowering.device_blocks import DeviceBlocks, DeviceInputs
from pageflight.lowering.device_ops import DeviceOps
from pageflight.lowering.device_weight import DeviceWeight, load_weights
from pageflight.lowering.engine_dir import EngineDir
from pageflight.lowering.parallel_ops import ParallelOps
from pageflight.models.config import DecoderConfig
from pageflight.models.decoder import decoder
from pageflight.models.ops import Ops
from pageflight.models.stages import Place, Stage, whole
from pageflight.models.weights import LayerNames
from pageflight.quant.sharding import ShardStore
from pageflight.quant.store import Weights

COMPUTE = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.bfloat16,
    "int8": torch.bfloat16,
    "int4": torch.bfloat16,
}


class DeviceModel(ABC):
    """Runs passes on the device of its `blocks` with tensors that are there already; nothing waits for the host."""

    def __init__(self, config: DecoderConfig, blocks: DeviceBlocks, stage: Stage | None = None) -> None:
        """`stage`: the layers of `config`, if they are not all of the model."""
        self.config, self.blocks, self.device = config, blocks, blocks.device
        self.stage = stage or whole(config)

    @property
    @abstractmethod
    def activations(self) -> torch.dtype:
        """The type of queries, and of what passes between products."""

    @abstractmethod
    def forward(self, inputs: DeviceInputs) -> Tensor:
        """Logits [L, V], or of a stage that is not the last what the next one takes: [T, H]. May be captured in a graph
        where `inputs` stay in place."""

    def hidden(self, num_tokens: int) -> Tensor | None:
        """Room for what the stage before passes on: [T, H]. None for one that begins with ids."""
        if self.stage.is_first:
            return None
        return torch.zeros(num_tokens, self.config.hidden_size, dtype=self.activations, device=self.device)

    @property
    def prepares_sizes(self) -> bool:
        """Whether the first decode step of each number of rows takes long: all of them are to run before serving."""
        return False

    def can_capture(self, stream: int) -> bool:
        """Whether decode steps, as those that have run so far, can be captured on a stream (its CUDA handle)."""
        return True

    @torch.inference_mode()
    def pass_bytes(self, num_tokens: int, num_rows: int) -> int:
        """Most memory that a pass of so many tokens and rows of logits takes, measured; before blocks are allocated."""
        if self.device.type != "cuda":
            return 0

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=self.device)

        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.blocks.allocate(1)
        self.forward(
            DeviceInputs(
                ids_T=zeros(num_tokens),
                positions_T=zeros(num_tokens),
                slots_T=zeros(num_tokens) - 1,
                tables_SM=zeros(1, -(-num_tokens // self.blocks.block_size)),
                token_begins=torch.tensor([0, num_tokens], dtype=torch.int32, device=self.device),
                past_lens_S=zeros(1),
                max_query_len=num_tokens,
                take_L=zeros(num_rows),
                hidden_TH=self.hidden(num_tokens),
            )
        )
        torch.cuda.synchronize(self.device)
        self.blocks.free()
        return torch.cuda.max_memory_allocated(self.device) - before

    def warmed_up(self) -> None:  # noqa: B027
        """What steps launch has run once; a model that keeps what it compiled for the next start does so now."""

    def close(self) -> None:
        self.blocks.free()


class KernelModel(DeviceModel):
    """The decoder on our kernels and torch's products."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: Mapping[str, DeviceWeight],
        blocks: DeviceBlocks,
        *,
        max_model_len: int,
        stage: Stage | None = None,
    ) -> None:
        """`weights`: every one that the definition reads of these layers, on the device."""
        super().__init__(config, blocks, stage)
        self._activations = weights[LayerNames.of(self.stage.begin).input_norm].values.dtype
        self._ops = DeviceOps(config, weights, blocks, num_positions=max_model_len)
        self._decoder_ops: Ops[Any] = self._ops

    @property
    def activations(self) -> torch.dtype:
        return self._activations

    @classmethod
    def load(
        cls,
        engine: EngineDir,
        device: torch.device,
        compute: torch.dtype | None = None,
        communicator: Communicator | None = None,
    ) -> KernelModel:
        """An engine onto a device, or one rank's part of it: of its stage, its heads. `compute`: the type of
        activations, by default that of the engine's dtype."""
        manifest, config, store = engine.manifest, engine.config, engine.weights
        place = communicator.place if communicator is not None else Place(rank=0)
        split = engine.split(place.shard) if place.tensor_parallel > 1 else None
        stage = engine.stages(place.pipeline_parallel)[place.stage]
        rank_config = config if split is None else split.rank_config
        rank_config = replace(rank_config, num_layers=stage.end - stage.begin)
        parts: Weights = store if split is None else ShardStore(store, split)
        compute = compute or COMPUTE[manifest.dtype]
        weights = load_weights(parts, stage.names(config), compute, device)
        # The reference computes in float32; here queries are narrower, and keys and values are rounded to their type.
        narrow = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(compute)
        kv_dtype = narrow if narrow and manifest.kv_dtype == "fp32" else manifest.kv_dtype
        blocks = DeviceBlocks(rank_config, kv_dtype, manifest.block_size, device)
        model = cls(rank_config, weights, blocks, max_model_len=manifest.max_model_len, stage=stage)
        if split is not None and communicator is not None:
            model._decoder_ops = ParallelOps(model._decoder_ops, split, communicator)
        return model

    @torch.inference_mode()
    def forward(self, inputs: DeviceInputs) -> Tensor:
        self._ops.prepare(inputs)
        return self._ops.value(decoder(self._decoder_ops, self.config, self.stage, inputs.hidden_TH))
