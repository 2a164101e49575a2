"""What a runner for GPUs launches before it serves: on a model that only looks at what it is given."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, is_tensor

from pageflight.core.plan import RowStart, StepPlan
from pageflight.core.request import SamplingParams
from pageflight.kernels.tuning import AttentionTiles
from pageflight.lowering import device_blocks
from pageflight.lowering.device_blocks import DeviceBlocks, DeviceInputs
from pageflight.lowering.device_model import DeviceModel
from pageflight.models.config import DecoderConfig
from pageflight.runners import device, device_rows
from pageflight.runners.device import DeviceRunner
from pageflight.runners.device_graphs import RUNS_BEFORE, bucket_sizes

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=7,
    hidden_size=16,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=16,
    intermediate_size=16,
    max_positions=64,
    rms_norm_eps=1e-5,
)
BLOCK_SIZE = 16


class LookingModel(DeviceModel):
    """Keeps what passes are given; every logit is 0."""

    def __init__(self, *, is_slow: bool = False) -> None:
        """`is_slow`: at the first decode step of each size."""
        self.is_slow = is_slow
        super().__init__(CONFIG, DeviceBlocks(CONFIG, "fp32", BLOCK_SIZE, torch.device("cpu")))
        self.seen: list[DeviceInputs] = []

    @property
    def prepares_sizes(self) -> bool:
        return self.is_slow

    @property
    def activations(self) -> torch.dtype:
        return torch.float32

    def forward(self, inputs: DeviceInputs) -> Tensor:
        tensors = {field.name: getattr(inputs, field.name) for field in fields(inputs)}  # the next step writes to them
        self.seen.append(replace(inputs, **{name: each.clone() for name, each in tensors.items() if is_tensor(each)}))
        return torch.zeros(len(inputs.ids_T if inputs.take_L is None else inputs.take_L), CONFIG.vocab_size)

    @property
    def decoded(self) -> list[int]:
        return [len(inputs.ids_T) for inputs in self.seen if inputs.lens_S is not None]

    @property
    def chunks(self) -> list[list[int]]:
        begins = [inputs.token_begins for inputs in self.seen]
        return [each.diff().tolist() for each in begins if each is not None]


def runner_of(model: DeviceModel, *, max_num_seqs: int, max_model_len: int = 24, on_gpu: bool = True) -> DeviceRunner:
    sizes = {"num_blocks": 3, "max_num_seqs": max_num_seqs, "max_num_tokens": 100, "max_model_len": max_model_len}
    runner = DeviceRunner(model, **sizes)
    if on_gpu:
        runner._graphs._sizes = bucket_sizes(max_num_seqs)
    return runner


def test_a_warm_up_has_sequences_that_their_tables_have_room_for() -> None:
    """One sequence as long as a step was longer than the model's longest: what lay behind its table became blocks."""
    model = LookingModel()
    runner_of(model, max_num_seqs=3).warm_up(100)
    assert max(model.chunks, key=sum) == [24, 24, 24], "as many tokens as a step of three sequences can have"
    for inputs in model.seen:
        if inputs.past_lens_S is not None and inputs.token_begins is not None:
            most_keys = int((inputs.past_lens_S + inputs.token_begins.diff()).max())
            assert most_keys <= min(24, inputs.tables_SM.shape[1] * BLOCK_SIZE)
        assert not inputs.positions_T.any() and (inputs.slots_T == -1).all(), "tables of positions have an end, too"


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_runner_of_one_row_warms_up(on_gpu: bool) -> None:
    """It decoded two rows, for which nothing had room, and did not start."""
    model = LookingModel()
    runner = runner_of(model, max_num_seqs=1, on_gpu=on_gpu)
    runner.warm_up(4)
    assert set(model.decoded) == {1}
    with pytest.raises(AssertionError, match="2 rows of 1"):
        runner._graphs.bucket_of(2)


def test_whatever_serving_launches_was_launched_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels were compiled in the middle of serving: of 65 to 128 tokens, of sizes measured on the card, and the copy
    of the first block that was shared."""
    copied: list[tuple[list[int], ...]] = []
    monkeypatch.setattr(device_blocks, "copy_blocks", lambda cache, *ids: copied.append(tuple(map(list, ids))))
    for module in (device, device_rows):
        monkeypatch.setattr(module, "LONG_CONTEXT", 50)
    monkeypatch.setattr(device, "default_tiles", lambda *sizes: AttentionTiles(keys=16, num_splits=2))
    model = LookingModel()
    runner_of(model, max_num_seqs=20, max_model_len=100).warm_up(100)
    assert copied == [([-1], [-1])]
    assert set(model.decoded) == {1, 2, 4, 8, 16, 20}
    assert {sum(lengths) for lengths in model.chunks if len(lengths) == 1} == {1, 2, 4, 8, 16, 32, 64, 100}
    long = [inputs.long_lens_S.tolist() for inputs in model.seen if inputs.long_lens_S is not None]
    assert long == [[51] * size for size in (1, 2, 4, 8, 16, 20)]


def test_a_model_that_prepares_each_size_runs_all_of_them() -> None:
    """TensorRT compiled for most sizes, on the thread that serves, when rows came to be so many."""
    for is_slow, expected in ((False, [1, 2, 4, 8, 16, 32, 40]), (True, [1, 2, 4, 8, 16, 24, 32, 40])):
        model = LookingModel(is_slow=is_slow)
        runner_of(model, max_num_seqs=40).warm_up(1)
        assert list(dict.fromkeys(model.decoded)) == expected


def test_all_graphs_can_be_captured_before_something_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was measured still captured some: a load passes through a size once or twice."""
    runner = runner_of(LookingModel(), max_num_seqs=9)
    runs: list[tuple[int, bool, bool]] = []
    monkeypatch.setattr(
        runner._graphs, "run", lambda staged, *kinds: runs.append((len(staged.rows_S), *kinds)) or torch.zeros(0)
    )
    runner.capture_all(filters=True)
    assert runs == [(size, True, False) for size in (1, 2, 4, 8, 9) for _ in range(RUNS_BEFORE + 1)]


class LateStream:
    """A stream that copies what it is to copy whenever it likes."""

    def wait_stream(self, other: object) -> None: ...

    def record_event(self) -> Any:
        return LateEvent()


class LateEvent:
    def synchronize(self) -> None: ...


def test_results_stay_in_place_until_they_have_been_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said to be in use by a second stream, their memory never returned once a capture had failed."""
    empty, made = torch.empty, []

    def unpinned(*shape: Any, pin_memory: bool = False, **settings: Any) -> Tensor:
        tensor = empty(*shape, **settings)
        if not pin_memory and tensor.shape == (3, 1):
            made.append(weakref.ref(tensor))
        return tensor

    runner = runner_of(LookingModel(), max_num_seqs=2, on_gpu=False)
    runner._copies = LateStream()
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch, "empty", unpinned)
    start = RowStart(0, 0, 0, np.array([3, 4], np.int32), 2, SamplingParams())
    one, no = np.ones(1, np.int32), np.zeros(1, np.int32)
    runner.submit(
        StepPlan(step=0, rows=no, starts_at=no, lengths=2 * one, samples=one.astype(np.bool_), starts=(start,))
    )
    gc.collect()
    assert sum(tensor() is not None for tensor in made) == 1
    assert runner.collect().sampled_ids.tolist() == [0]
    gc.collect()
    assert not any(tensor() is not None for tensor in made)
