"""What `pageflight plan` counts, beside what engines allocate."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import engines
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig
from pageflight.core.plan import RowStart, StepPlan
from pageflight.core.request import SamplingParams
from pageflight.kv.capacity import DEFAULT_FRACTION, FreeMemory, resolve_capacity
from pageflight.lowering import registry
from pageflight.lowering.device_blocks import DeviceBlocks, DeviceInputs
from pageflight.lowering.device_model import KernelModel
from pageflight.lowering.device_weight import DeviceWeight
from pageflight.lowering.engine_dir import open_engine
from pageflight.lowering.torch_cache import BlockCache
from pageflight.models.config import DecoderConfig
from pageflight.runners import device_factory
from pageflight.runners.device import DeviceRunner
from pageflight.runners.device_rows import rows_bytes
from pageflight.runners.device_wishes import wishes_bytes
from pageflight.runners.factory import load_engine
from pageflight_build.plan import fit as fits
from pageflight_build.plan.cards import GIB, Card
from pageflight_build.plan.demand import Demand
from pageflight_build.plan.fit import fit
from pageflight_build.plan.layouts import Layout
from pageflight_build.plan.shares import Holder, kv_bytes_per_block, pass_bytes, shares_of, stored_bytes

CONFIG = DecoderConfig(
    family="llama", vocab_size=96, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16,
    intermediate_size=160, max_positions=128, rms_norm_eps=1e-5,
)  # fmt: skip


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations made and somebody still holds; `peak` is the most of them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._holders: Counter[int] = Counter()
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor) and id(tensor) not in self._seen:
                self._hold(tensor)
        return made

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Tensors that were there before, and views of them."""
        for tensor in tensors:
            self._holders[tensor.untyped_storage().data_ptr()] += 1

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        where, size = storage.data_ptr(), storage.nbytes()
        if not self._holders[where]:
            self.now += size
            self.peak = max(self.peak, self.now)
        self._holders[where] += 1
        self._seen.add(id(tensor))
        weakref.finalize(tensor, self._drop, id(tensor), where, size)

    def _drop(self, tensor_id: int, where: int, size: int) -> None:
        self._seen.discard(tensor_id)
        self._holders[where] -= 1
        if not self._holders[where]:
            self.now -= size


def kernel_model(config: DecoderConfig) -> tuple[KernelModel, list[torch.Tensor]]:
    """A float32 decoder on kernels, in Triton's interpreter, and its weights and blocks."""
    from pageflight.models.weights import HEAD, expected_shapes

    shapes = expected_shapes(config)
    weights = {name: DeviceWeight("wide", torch.randn(shape) * 0.05) for name, shape in shapes.items()}
    assert HEAD in weights
    blocks = DeviceBlocks(config, "fp32", 32, torch.device("cpu"))
    blocks.allocate(8)
    assert blocks.cache is not None
    model = KernelModel(config, weights, blocks, max_model_len=128)
    return model, [*(weight.values for weight in weights.values()), blocks.cache]


@pytest.mark.parametrize(("num_tokens", "num_rows", "changes"), [
    (40, 2, {}),
    (40, 2, {"num_layers": 2}),
    (40, 2, {"intermediate_size": 32}),
    (32, 32, {"vocab_size": 4096}),
])  # fmt: skip
def test_the_largest_pass_is_what_its_tensors_take(num_tokens: int, num_rows: int, changes: dict[str, int]) -> None:
    """The plan forgot that the layer before still has its values: a card that was to suffice ran out of memory."""
    config = replace(CONFIG, **changes)
    model, before = kernel_model(config)
    integers = torch.zeros(num_tokens, dtype=torch.int32)
    inputs = DeviceInputs(
        ids_T=integers,
        positions_T=torch.arange(num_tokens, dtype=torch.int32),
        slots_T=torch.arange(num_tokens, dtype=torch.int32),
        tables_SM=torch.arange(4, dtype=torch.int32)[None],
        token_begins=torch.tensor([0, num_tokens], dtype=torch.int32),
        past_lens_S=torch.zeros(1, dtype=torch.int32),
        max_query_len=num_tokens,
        take_L=torch.arange(num_rows),
    )
    with LiveBytes() as live:
        live.ignore(*before)
        model.forward(inputs)
    planned = pass_bytes(config, num_tokens, num_rows, config.num_layers, 4)
    assert planned == pytest.approx(live.peak, rel=0.1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planned") / "checkpoint"
    engines.make_checkpoint(folder)
    return folder


@pytest.mark.parametrize(("lowering", "dtype", "kv_dtype"), [
    ("openvino", "fp32", ""),
    ("openvino", "int8", "u8"),
    ("openvino", "bf16", ""),
    ("torch", "fp32", "u8"),
    ("torch", "fp8", "bf16"),
    ("torch", "int4", "fp32"),
])  # fmt: skip
def test_weights_and_blocks_are_those_of_a_loaded_engine(
    checkpoint: Path, tmp_path: Path, lowering: str, dtype: str, kv_dtype: str
) -> None:
    """The scales of u8 blocks were forgotten, and OpenVINO's keys have theirs by channel: an eighth of the memory."""
    folder = engines.make_engine(checkpoint, tmp_path / "engine", lowering, dtype=dtype, kv_dtype=kv_dtype)
    loaded = load_engine(folder, EngineConfig(kv=KVConfig(num_blocks=40), scheduler=SchedulerConfig(max_model_len=160)))
    store = open_engine(folder, lowering)
    assert stored_bytes(store.config, dtype, 0) == store.weights.num_bytes
    holder = Holder(is_gpu=lowering != "openvino")  # the reference has a GPU's layout
    per_block = kv_bytes_per_block(store.config, loaded.manifest.kv_dtype, store.config.num_layers, holder)
    assert 40 * per_block == loaded.capacity.num_bytes
    loaded.runner.close()


@pytest.mark.parametrize("kv_dtype", ["fp32", "fp16", "bf16"])
def test_blocks_are_those_of_a_gpu(kv_dtype: str) -> None:
    device = DeviceBlocks(CONFIG, kv_dtype, 32, torch.device("cpu"))
    assert kv_bytes_per_block(CONFIG, kv_dtype, CONFIG.num_layers, Holder()) == device.bytes_per_block
    assert device.bytes_per_block == BlockCache.bytes_per_block(CONFIG, kv_dtype, 32)


def test_rows_take_what_a_gpu_s_runner_allocates() -> None:
    """Rows and scores were in no plan: a card that was to suffice for 256 of them and a large vocabulary did not."""
    config = replace(CONFIG, vocab_size=128_256, hidden_size=16)
    model, before = kernel_model(config)
    model.blocks.free()
    num_rows, longest = 64, 2048
    penalty = SamplingParams(presence_penalty=0.5)
    starts = tuple(RowStart(row, row, 0, np.ones(2, np.int32), 2, penalty) for row in range(num_rows))
    nothing = np.zeros(0, np.int32)
    plan = StepPlan(step=0, rows=nothing, starts_at=nothing, lengths=nothing, samples=nothing == 1, starts=starts)
    sizes = {"num_blocks": 1, "max_num_seqs": num_rows, "max_num_tokens": 64, "max_model_len": longest}
    with LiveBytes() as live:
        live.ignore(*before)
        runner = DeviceRunner(model, **sizes)
        wishes = runner._wishes.prepared(plan)
    assert model.blocks.cache is not None and len(wishes) == num_rows
    staging = sum(buffer.nbytes for buffer in runner._rows._staging._host)  # on the host
    measured = live.now - staging - model.blocks.cache.nbytes
    (share,) = shares_of(config, Demand(context=longest, max_num_seqs=num_rows), Layout(), Holder())
    assert share.rows_bytes == rows_bytes(num_rows, longest, 32) + wishes_bytes(num_rows, config.vocab_size)
    assert share.rows_bytes == pytest.approx(measured, rel=0.1)
    first, last = shares_of(config, Demand(context=longest, max_num_seqs=num_rows), Layout(pipeline=2), Holder())
    assert last.rows_bytes == share.rows_bytes and first.rows_bytes == rows_bytes(num_rows, longest, 32)


def test_constants_are_those_of_the_engine() -> None:
    """They are written down twice, because a build imports no runner."""
    assert device_factory.RESERVED_BYTES == fits.RESERVED_BYTES and fits.CPU_FRACTION == DEFAULT_FRACTION


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "int8", "int4"])
def test_weights_on_a_gpu_are_those_that_it_loads(checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    """Norms are float32 in the file and bf16 on the device; small groups are widened there."""
    folder = engines.make_engine(checkpoint, tmp_path / "engine", "torch", dtype=dtype)
    engine = open_engine(folder, "torch")
    model = KernelModel.load(engine, torch.device("cpu"))
    tensors = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
        for weight in model._ops._weights.values()
        for part in (weight.values, weight.scales, weight.input_scale)
        if part is not None
    }
    demand = Demand(dtype=dtype, context=160)
    (share,) = shares_of(engine.config, demand, Layout(), Holder())
    assert share.weight_bytes == sum(tensors.values())
    tables = model._ops._cosines, model._ops._sines
    assert share.table_bytes == sum(table.nbytes for table in tables)


def test_blocks_are_as_many_as_a_gpu_engine_would_make() -> None:
    """The plan promised more blocks than the engine had: half of the sequences waited."""
    card = Card(name="made up", kind="gpu", memory_bytes=2 * GIB)
    demand = Demand(dtype="fp16", kv_dtype="fp16", context=128, max_num_seqs=100_000, max_num_tokens=64)
    planned = fit(CONFIG, demand, card, Layout())
    (share,) = shares_of(CONFIG, demand, Layout(), Holder())
    used = share.weight_bytes + share.table_bytes + share.pass_bytes + share.rows_bytes
    free = int(card.memory_bytes * 0.9) - used - device_factory.RESERVED_BYTES
    capacity = resolve_capacity(
        KVConfig(block_size=32),
        SchedulerConfig(max_model_len=128, max_num_seqs=100_000),
        bytes_per_block=share.block_bytes,
        free=FreeMemory(num_bytes=free, source="left"),
        fraction=1.0,
    )
    assert planned.num_blocks == capacity.kv.num_blocks > 1000


LOADS = """
import ctypes, gc, sys
from pathlib import Path
import numpy as np, psutil
from pageflight.lowering import registry
from pageflight.lowering.passes import Run, pack

def private_bytes():
    gc.collect(), ctypes.CDLL("libc.so.6").malloc_trim(0)
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared

def loaded(folder):
    model = registry.get("openvino").load(Path(folder), num_threads=2)
    model.allocate(300)
    for length in (64, 1):
        model.start(pack([Run(list(range(length)), 0, [0, 1])], 32))
        model.wait()
    for blocks in model._blocks:
        blocks[:] = 1
    return model

small = loaded(sys.argv[1])  # brings threads and code
before = private_bytes()
model = loaded(sys.argv[2])
print(private_bytes() - before, 300 * model.kv_bytes_per_block)
"""


def large_checkpoint(folder: Path) -> Path:
    """49 million parameters, made fast; no two weights are alike, for OpenVINO would hold one for both."""
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=768, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=3, intermediate_size=2560, vocab_size=2000, max_position_embeddings=512,
        tie_word_embeddings=False,
    ).save_pretrained(folder)  # fmt: skip
    from pageflight.models.families import family_of, read_config

    config = read_config(folder)
    pattern = (np.random.default_rng(0).standard_normal(4093) * 0.02).astype(np.float16)
    sources = [source for spec in family_of(config).weights(config) for source in spec.sources]
    arrays = {source.name: np.resize(np.roll(pattern, index), source.shape) for index, source in enumerate(sources)}
    save_file(arrays, folder / "model.safetensors")
    return folder


def test_private_memory_of_a_process_is_what_was_planned(checkpoint: Path, tmp_path: Path) -> None:
    """OpenVINO held float32 copies of bf16 weights beside them, three times the file: nobody had looked."""
    source = large_checkpoint(tmp_path / "checkpoint")
    for dtype in ("fp32", "int8", "bf16"):
        kv_dtype = registry.get("openvino").default_kv_dtype(dtype)
        if dtype == "bf16" and kv_dtype != "bf16":
            continue  # without that arithmetic nothing was measured
        small = engines.make_engine(checkpoint, tmp_path / f"small-{dtype}", "openvino", dtype=dtype)
        large = engines.make_engine(source, tmp_path / dtype, "openvino", max_len=512, dtype=dtype)
        command = [sys.executable, "-c", LOADS, small, large]
        steady = {**os.environ, "MALLOC_ARENA_MAX": "1"}  # heaps of many threads hold some megabytes more or less
        run = subprocess.run(command, env=steady, capture_output=True, text=True, check=True)
        grown, kv_bytes = (int(word) for word in run.stdout.split())
        config = open_engine(large, "openvino").config
        demand = Demand(dtype=dtype, kv_dtype=kv_dtype, context=512)
        planned = fit(config, demand, Card(name="cpu", kind="cpu", memory_bytes=GIB), Layout())
        assert planned.weight_bytes + planned.table_bytes + kv_bytes == pytest.approx(grown, rel=0.1), dtype
