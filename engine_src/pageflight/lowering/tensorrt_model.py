"""TensorRT segments run on a GPU, with attention over our blocks between them, and sums over ranks where there are.

Shapes: T packed tokens, L rows of logits, D head_dim.

What carries out a segment is a seam: `TensorRtSegments` on a GPU; in tests, whatever computes what the networks say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from pageflight.core.errors import ConfigError, ManifestMismatch
from pageflight.lowering.communicator import Communicator
from pageflight.lowering.device_blocks import DeviceBlocks, DeviceInputs
from pageflight.lowering.device_model import DeviceModel
from pageflight.lowering.engine_dir import EngineDir
from pageflight.lowering.nccl import join_ranks
from pageflight.lowering.parallel_ops import all_logits, own_ids
from pageflight.lowering.tensorrt_caches import RuntimeCache, runtime_path
from pageflight.lowering.tensorrt_engines import TensorRtSegments
from pageflight.lowering.tensorrt_gpu import find_gpu
from pageflight.lowering.tensorrt_ops import StoredTensors
from pageflight.lowering.tensorrt_plan import ROWS, TOKENS, EnginePlan, Profile, TensorSpec
from pageflight.lowering.tensorrt_ranks import RankTensors
from pageflight.lowering.tensorrt_target import import_flavor
from pageflight.models.rope import rope_tables

Result = TypeVar("Result")

TYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
    "int4": torch.uint8,  # two in a byte
    "int32": torch.int32,
}


class Segments(Protocol):
    """Carries out segments by name."""

    def run(self, segment: str, profile: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Compute `outputs` from `inputs`, on the stream that is current; `profile` counts from 0."""

    def can_capture(self, stream: int) -> bool:
        """Whether decode steps as they have run so far can be captured on a stream (its CUDA handle)."""

    def save(self) -> None:
        """Keep what was compiled for the next start."""


class SegmentModel(DeviceModel):
    """The plan of an engine directory, step by step; or one rank's part in it."""

    def __init__(
        self,
        engine: EngineDir,
        plan: EnginePlan,
        segments: Segments,
        device: torch.device,
        communicator: Communicator | None = None,
    ) -> None:
        """`plan`: of this rank, where a `communicator` leads to others."""
        manifest, config = engine.manifest, engine.config
        store: StoredTensors = engine.weights
        self._communicator, self._vocabulary = communicator, slice(0, config.vocab_size)
        if communicator is not None:
            split = engine.split(communicator.place.shard)
            store, config, self._vocabulary = RankTensors(engine.weights, split), split.rank_config, split.vocabulary
        super().__init__(config, DeviceBlocks(config, manifest.kv_dtype, manifest.block_size, device))
        self._plan, self._engines = plan, segments
        self._num_for_tokens = 1 + max(index for index, run in enumerate(plan.runs) if run.attention >= 0)
        self._segments = {segment.name: segment for segment in plan.segments}
        half = config.head_dim // 2
        cosines, sines = (
            torch.from_numpy(table[:, :half].copy()).to(device) for table in rope_tables(config, manifest.max_model_len)
        )
        self._tables = {"rope.cosines": cosines, "rope.sines": sines}
        # q and k come turned already: these leave them as they are, whatever the position.
        self._ones = torch.ones(1, half, device=device).expand(manifest.max_model_len, half)
        self._zeros = torch.zeros(1, half, device=device).expand(manifest.max_model_len, half)
        self._weights = [
            {
                spec.name: load_weight(store, run.weights[spec.name], spec, device)
                for spec in self._segments[run.segment].inputs
                if spec.kind == "weight"
            }
            for run in plan.runs
        ]

    @property
    def activations(self) -> torch.dtype:
        return TYPES[self._plan.activations]

    @property
    def prepares_sizes(self) -> bool:
        return True  # contexts are made, and the RTX flavor compiles kernels

    def can_capture(self, stream: int) -> bool:
        return self._engines.can_capture(stream)

    @torch.inference_mode()
    def forward(self, inputs: DeviceInputs) -> Tensor:
        num_tokens = len(inputs.ids_T)
        take = inputs.take_L
        if take is None:
            take = torch.arange(num_tokens, dtype=torch.int32, device=self.device)
        buffers = {"ids": inputs.ids_T, "positions": inputs.positions_T, "take": take}
        if self._plan.tensor_parallel > 1:
            buffers["ids"], elsewhere = own_ids(inputs.ids_T, self._vocabulary)
            buffers["here"] = (~elsewhere)[:, None].to(self.activations)
        profile = self._profile(num_tokens, len(take), decodes=inputs.lens_S is not None)
        for index, (run, weights) in enumerate(zip(self._plan.runs, self._weights, strict=True)):
            if index == self._num_for_tokens and not len(take):
                return torch.empty(0, self.config.vocab_size, device=self.device)
            segment = self._segments[run.segment]
            given = {spec.name: self._given(spec, run.buffers, weights, buffers) for spec in segment.inputs}
            made = {spec.name: self._made(spec, num_tokens, len(take)) for spec in segment.outputs}
            self._engines.run(run.segment, profile, given, made)
            buffers.update((run.buffers[name], tensor) for name, tensor in made.items())
            if run.summed and self._communicator is not None:
                buffers[run.summed] = self._communicator.all_reduce(buffers[run.summed])
            if run.attention >= 0:
                qkv = torch.cat([buffers.pop(name) for name in ("q", "k", "v")], 1)
                buffers["attended"] = self.blocks.attend(run.attention, qkv, self._ones, self._zeros, inputs)
        logits = buffers["logits"]
        return logits if self._communicator is None else all_logits(self._communicator, logits, self.config.vocab_size)

    @torch.inference_mode()
    def try_out(self) -> None:
        """A chunk and a decode step of one token that nobody has, before blocks are allocated: raises what refuses.

        Another rank may be refused and never come to a sum: those between engines are left out.
        """
        communicator, self._communicator = self._communicator, None
        self.pass_bytes(1, 1)
        one = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.blocks.allocate(1)
        self.forward(DeviceInputs(ids_T=one, positions_T=one, slots_T=one - 1, tables_SM=one.view(1, 1), lens_S=one))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.blocks.free()
        self._communicator = communicator

    def warmed_up(self) -> None:
        self._engines.save()

    def close(self) -> None:
        self._engines.save()  # sizes that came after the warm-up were compiled for too
        super().close()

    def _given(
        self, spec: TensorSpec, names: Mapping[str, str], weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
    ) -> Tensor:
        if spec.kind == "weight":
            return weights[spec.name]
        if spec.kind == "table":
            return self._tables[spec.name]
        return buffers[names[spec.name]]

    def _made(self, spec: TensorSpec, num_tokens: int, num_rows: int) -> Tensor:
        sizes = {TOKENS: num_tokens, ROWS: num_rows}
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        return torch.empty(shape, dtype=TYPES[spec.dtype], device=self.device)

    def _profile(self, num_tokens: int, num_rows: int, *, decodes: bool) -> int:
        """The first that takes a decode step. Steps with chunks run the last: they have any size, and the flavor that
        compiles does so for every size of the others."""
        profiles = self._plan.profiles
        for index in range(0 if decodes else len(profiles) - 1, len(profiles)):
            if _takes(profiles[index], num_tokens, num_rows):
                return index
        most = profiles[-1]
        raise ConfigError(
            f"a step of {num_tokens} tokens and {num_rows} rows: these engines take {most.max_tokens} and"
            f" {most.max_rows}; build them with larger max_num_tokens and max_num_seqs"
        )


def load_segments(
    engine: EngineDir,
    folder: Path,
    device: torch.device,
    segments: Segments | None = None,
    communicator: Communicator | None = None,
) -> SegmentModel:
    """An engine directory onto a GPU, or a rank's part of it; `segments` carries out its engines, by default TensorRT.

    Raises ConfigError where its TensorRT is not here, does not take the card, or loads the engines and cannot run them:
    on all ranks where it is so on one.
    """
    plan = EnginePlan.read(folder)
    size = 1 if communicator is None else communicator.place.tensor_parallel
    if plan.tensor_parallel != size:
        raise ManifestMismatch(f"{folder}: its segments are those of {plan.tensor_parallel} ranks, not of {size}")
    if communicator is not None:
        plan = plan.of_rank(communicator.place.shard.rank)

    agreed = partial(_agreed, folder, plan, communicator)
    if segments is None:
        segments = engines = agreed(partial(_engines, engine, folder, plan, device))
        if communicator is not None and plan.collectives == "inside":
            # Both wait for all ranks: whatever can be refused by one alone is tried before.
            agreed(engines.try_contexts)
            engines.join(agreed(partial(join_ranks, communicator, device)))
    model = SegmentModel(engine, plan, segments, device, communicator)
    agreed(model.try_out)
    return model


def _agreed(folder: Path, plan: EnginePlan, communicator: Communicator | None, attempt: Callable[[], Result]) -> Result:
    """What the attempt gives, once all ranks have made theirs. What the bindings raise, which is not documented, is a
    ConfigError; it is one too where another rank had it."""
    refusal = None
    try:
        result = attempt()
    except ConfigError as error:
        refusal = str(error)
    except (RuntimeError, TypeError, AttributeError) as error:
        refusal = f"{folder}: {plan.flavor} TensorRT cannot run it here: {error}"
    if communicator is not None and not communicator.least(int(refusal is None)):
        refusal = refusal or f"{folder}: {plan.flavor} TensorRT cannot run it on another rank"
    if refusal is not None:
        raise ConfigError(refusal)
    return result


def _engines(engine: EngineDir, folder: Path, plan: EnginePlan, device: torch.device) -> TensorRtSegments:
    trt = import_flavor(plan.flavor)
    gpu = find_gpu(device.index or 0)
    kernels = None
    if gpu is not None and plan.flavor == "rtx":
        files = {segment.file for segment in plan.segments}
        hashes = [record.sha256 for record in engine.manifest.files if record.path in files]
        kernels = RuntimeCache(runtime_path(engine.manifest.fingerprint, hashes, gpu))
    return TensorRtSegments(trt, folder, plan, device, kernels=kernels)


def _takes(profile: Profile, num_tokens: int, num_rows: int) -> bool:
    return profile.min_tokens <= num_tokens <= profile.max_tokens and num_rows <= profile.max_rows


def load_weight(store: StoredTensors, name: str, spec: TensorSpec, device: torch.device) -> Tensor:
    """As the file has it, in the shape that the engine wants: int4 stays two in a byte."""
    tensor = torch.from_numpy(store.tensor(name).copy())
    if tensor.dtype != TYPES[spec.dtype] and tensor.dtype.itemsize == TYPES[spec.dtype].itemsize:
        tensor = tensor.view(TYPES[spec.dtype])
    return tensor.to(device)
