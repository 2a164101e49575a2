"""The torch lowering: eager, on the CPU; what every other lowering is compared with."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pageflight.core.errors import ConfigError, ManifestMismatch
from pageflight.lowering.alone import AloneModel
from pageflight.lowering.base import CompiledModel, Ops, StepInputs
from pageflight.lowering.communicator import Communicator
from pageflight.lowering.engine_dir import EngineDir, Verification, compare_fingerprints, open_engine
from pageflight.lowering.parallel_ops import ParallelOps
from pageflight.lowering.torch_cache import KV_DTYPES, BlockCache
from pageflight.lowering.torch_ops import EagerOps
from pageflight.models.config import DecoderConfig
from pageflight.models.decoder import decoder
from pageflight.models.stages import Stage, whole
from pageflight.quant.sharding import ShardStore

_COMPUTE = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float32,
    "int8": torch.float32,
    "int4": torch.float32,
}


class TorchModel:
    """Runs steps eagerly; `wait` computes, for torch has nothing to start on a CPU."""

    def __init__(
        self,
        config: DecoderConfig,
        ops: EagerOps,
        kv_dtype: str,
        block_size: int,
        parallel: ParallelOps | None = None,
        stage: Stage | None = None,
    ) -> None:
        """`parallel`: the same `ops` among those of other ranks. `stage`: the layers of `config`, if it is not all."""
        self.block_size, self.vocab_size, self.token_tile = block_size, config.vocab_size, 1
        self.replay_rows, self.num_threads = 1, torch.get_num_threads()
        self.kv_bytes_per_block = BlockCache.bytes_per_block(config, kv_dtype, block_size)
        self._config, self._ops, self._kv_dtype = config, ops, kv_dtype
        self._decoder_ops: Ops[Tensor] = parallel or ops
        self._stage = stage or whole(config)
        self._inputs: StepInputs | None = None

    def allocate(self, num_blocks: int, num_host_blocks: int = 0) -> None:
        assert self._ops.cache is None, "blocks are allocated once"
        try:
            self._ops.cache = BlockCache(self._config, self._kv_dtype, num_blocks, self.block_size, num_host_blocks)
        except RuntimeError as error:
            count = num_blocks + num_host_blocks
            raise ConfigError(f"{count} blocks of {self.kv_bytes_per_block} bytes: {error}") from None

    def start(self, inputs: StepInputs) -> None:
        self._inputs = inputs

    def wait(self) -> NDArray[np.float32]:
        assert self._inputs is not None, "start comes first"
        logits: NDArray[np.float32] = self.forward(self._inputs).numpy()
        return logits

    @torch.inference_mode()
    def forward(self, inputs: StepInputs, x: Tensor | None = None) -> Tensor:
        """Logits [L, V], float32, or what the next stage takes; `x` is what the stage before has made."""
        self._ops.prepare(inputs, self.block_size)
        out = decoder(self._decoder_ops, self._config, self._stage, x)
        return out.float() if self._stage.is_last else out

    def hidden(self, num_tokens: int) -> Tensor:
        """Room for what a stage passes on: [T, H]."""
        return torch.empty(num_tokens, self._config.hidden_size, dtype=self._ops.compute)

    def copy_blocks(self, sources: NDArray[np.int32], targets: NDArray[np.int32]) -> None:
        self._cache.copy(_index(sources), _index(targets))

    def copy_out(self, blocks: NDArray[np.int32], slots: NDArray[np.int32]) -> None:
        self._cache.copy_out(_index(blocks), _index(slots))

    def copy_in(self, slots: NDArray[np.int32], blocks: NDArray[np.int32]) -> None:
        self._cache.copy_in(_index(slots), _index(blocks))

    @property
    def _cache(self) -> BlockCache:
        assert self._ops.cache is not None, "allocate comes first"
        return self._ops.cache

    def close(self) -> None:
        self._ops.cache = None


def _index(ids: NDArray[np.int32]) -> Tensor:
    return torch.from_numpy(ids.astype(np.int64))


class TorchLowering:
    """The reference. Quantised weights are widened to float32 at each use, activations are float32 between products."""

    name = "torch"
    block_size = 32

    def fingerprint(self, dtype: str) -> dict[str, str]:
        """Versions an engine of `dtype` depends on."""
        self._check_dtype(dtype)
        return {"torch": torch.__version__, "machine": platform.machine()}

    def default_kv_dtype(self, dtype: str) -> str:
        return dtype if dtype in ("bf16", "fp16") else "fp32"

    def deterministic(self, model: CompiledModel, *, name: str, max_num_tokens: int) -> AloneModel:
        """One sequence at a time: what torch computes in batches depends on their shape."""
        return AloneModel(model)

    def check(self, config: DecoderConfig, dtype: str, kv_dtype: str, group_size: int = 0) -> None:
        """Raises ConfigError for an unknown dtype; shapes are all welcome."""
        self._check_dtype(dtype)
        if kv_dtype not in KV_DTYPES:
            raise ConfigError(f"kv_dtype={kv_dtype!r}: supported are {', '.join(KV_DTYPES)}")

    def _check_dtype(self, dtype: str) -> None:
        if dtype not in _COMPUTE:
            raise ConfigError(f"dtype={dtype!r}: supported with engine {self.name} are {', '.join(_COMPUTE)}")

    def open(self, engine_dir: Path) -> tuple[EngineDir, Verification]:
        """Open an engine directory, whose files are being verified. Raises ManifestMismatch naming what is wrong."""
        engine = self.opened(engine_dir)
        return engine, Verification(engine)

    def opened(self, engine_dir: Path) -> EngineDir:
        """Open an engine directory whose files somebody else verifies. Raises ManifestMismatch naming what is wrong."""
        engine = open_engine(engine_dir, self.name)
        manifest = engine.manifest
        try:
            here = self.fingerprint(manifest.dtype)
            self.check(engine.config, manifest.dtype, manifest.kv_dtype, manifest.quant_group_size)
        except ConfigError as error:
            raise ManifestMismatch(f"{engine_dir}: {error}") from None
        compare_fingerprints(engine_dir, manifest.fingerprint, here)
        return engine

    def load(self, engine_dir: Path, *, num_threads: int) -> TorchModel:
        """Load an engine directory. Raises ManifestMismatch naming what does not fit."""
        engine, verification = self.open(engine_dir)
        if num_threads:
            torch.set_num_threads(num_threads)
        manifest = engine.manifest
        ops = EagerOps(engine.config, engine.weights, manifest.max_model_len, _COMPUTE[manifest.dtype])
        verification.finish()
        return TorchModel(engine.config, ops, manifest.kv_dtype, manifest.block_size)

    def load_rank(self, engine_dir: Path, communicator: Communicator, *, num_threads: int) -> TorchModel:
        """Load one rank's part of an engine directory. The first rank alone verifies the files that all read.

        Raises ManifestMismatch naming what does not fit, ConfigError where it cannot be cut for so many ranks.
        """
        place = communicator.place
        engine = self.opened(engine_dir)
        split, stage = engine.split(place.shard), engine.stages(place.pipeline_parallel)[place.stage]
        verification = Verification(engine) if place.rank == 0 else None
        torch.set_num_threads(num_threads)
        manifest = engine.manifest
        config = replace(split.rank_config, num_layers=stage.end - stage.begin)
        weights = engine.weights if place.tensor_parallel == 1 else ShardStore(engine.weights, split)
        ops = EagerOps(config, weights, manifest.max_model_len, _COMPUTE[manifest.dtype])
        if verification is not None:
            verification.finish()
        parallel = ParallelOps(ops, split, communicator) if place.tensor_parallel > 1 else None
        return TorchModel(config, ops, manifest.kv_dtype, manifest.block_size, parallel, stage)
