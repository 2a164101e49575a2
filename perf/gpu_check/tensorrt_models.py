"""Random weights in the forms that a build stores, and engine directories of them, made where they are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pageflight.core.manifest import EngineManifest, FileRecord
from pageflight.lowering.tensorrt_build import build_engines
from pageflight.lowering.tensorrt_lowering import TensorRtLowering
from pageflight.lowering.tensorrt_plan import EnginePlan, profiles
from pageflight.lowering.tensorrt_target import TensorRtTarget
from pageflight.models.config import DecoderConfig
from pageflight.models.safetensors_file import DTYPES, SafetensorsWriter
from pageflight.quant.forms import WeightForm, input_scale_name, scale_name
from pageflight.quant.store import WEIGHTS_NAME, WeightStore

LAYER = DecoderConfig(  # of Llama-3.1-8B
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
SMALL = DecoderConfig(
    family="llama",
    vocab_size=1024,
    hidden_size=1024,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
    intermediate_size=2816,
    max_positions=512,
    rms_norm_eps=1e-5,
)
INPUT_SCALE = 0.03125
_NOISE = 1_000_003  # as many numbers are drawn, then repeated: a prime, so that no two rows are the same
_RMS = {"I8": 73.3, "I4": 4.6, "F8_E4M3": 130.0}  # of codes whose bits are random


class RandomTensors:
    """Tensors of a build by their stored names, made when they are asked for; products keep the size of activations."""

    def __init__(self, forms: Mapping[str, WeightForm]) -> None:
        self.forms = dict(forms)
        self.layout = {name: entry for key, form in forms.items() for name, entry in form.tensors(key).items()}
        random = np.random.default_rng(0)
        self._normal = random.standard_normal(_NOISE).astype(np.float32)
        self._codes = random.integers(0, 256, _NOISE, dtype=np.uint8)
        self._e4m3 = np.where(self._codes & 0x7F == 0x7F, 0, self._codes).astype(np.uint8)  # those are NaN
        self._special: dict[str, float] = {}
        for name, form in forms.items():
            if form.scales is not None:
                self._special[scale_name(name)] = form.shape[1] ** -0.5 / _RMS[form.dtype]
            if form.input_scale:
                self._special[input_scale_name(name)] = INPUT_SCALE

    def tensor(self, name: str) -> NDArray[Any]:
        dtype, shape = self.layout[name]
        if name in self._special:
            return np.resize(self._special[name] * np.abs(1 + 0.1 * self._normal), shape).astype(np.float32)
        if dtype in ("I8", "U8"):
            return np.resize(self._codes.view(DTYPES[dtype]), shape)
        if dtype == "F8_E4M3":
            return np.resize(self._e4m3.view(DTYPES[dtype]), shape)
        numbers = 1 + 0.1 * self._normal if len(shape) == 1 else shape[1] ** -0.5 * self._normal
        if dtype == "BF16":
            return np.resize(numbers.astype(np.float32).view(np.uint16)[1::2].view(DTYPES[dtype]), shape)
        return np.resize(numbers.astype(DTYPES[dtype]), shape)

    def stored_name(self, name: str) -> str:
        return name

    def save(self, path: Path) -> None:
        """Write them as `pageflight build` does."""
        writer = SafetensorsWriter(path, self.layout, {})
        for name in self.layout:
            writer.array(name)[...] = self.tensor(name)
        writer.close()


def write_engine(
    folder: Path, config: DecoderConfig, weights: RandomTensors, dtype: str, target: TensorRtTarget | None
) -> None:
    """An engine directory as `pageflight build` would make it; without `target`, its plan has no engines."""
    folder.mkdir()
    weights.save(folder / WEIGHTS_NAME)
    activations = TensorRtLowering().activations(dtype)
    if target is None:
        plan = EnginePlan(
            flavor="rtx",
            compute_capabilities=(),
            activations=activations,
            weights="input",
            profiles=profiles(1, 1),
            segments=(),
            runs=(),
        )
        plan.write(folder)
    else:
        build_engines(
            folder,
            config,
            WeightStore(folder / WEIGHTS_NAME, config),
            target,
            activations=activations,
            num_positions=config.max_positions,
            input_unit=1,
            advance=lambda done, total: None,
        )
    files = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        name = path.relative_to(folder).as_posix()
        files.append(FileRecord(path=name, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
    EngineManifest(
        name="random",
        family=config.family,
        lowering="tensorrt",
        dtype=dtype,
        kv_dtype=activations,
        block_size=TensorRtLowering.block_size,
        max_model_len=config.max_positions,
        vocab_size=config.vocab_size,
        model=config.to_json(),
        fingerprint={},
        files=tuple(files),
        tensor_parallel=1 if target is None else target.tensor_parallel,
    ).write(folder)
