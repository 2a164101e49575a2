"""The decoder on GPU kernels, run by Triton's interpreter on the CPU, beside the eager reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pageflight.lowering.base import StepInputs
from pageflight.lowering.device_blocks import DeviceInputs
from pageflight.lowering.device_model import DeviceModel, KernelModel
from pageflight.lowering.engine_dir import open_engine
from pageflight.lowering.torch_cache import BlockCache
from pageflight.lowering.torch_lowering import TorchLowering


class HostDriven:
    """A DeviceModel that takes a step's arrays as other compiled models do."""

    def __init__(self, model: DeviceModel) -> None:
        self.model, self.block_size, self.vocab_size = model, model.blocks.block_size, model.config.vocab_size

    def start(self, inputs: StepInputs) -> None:
        self.inputs = inputs

    def wait(self) -> np.ndarray:
        i, size = self.inputs, self.block_size
        lens = np.diff(i.token_begins)
        num_blocks = np.diff(i.block_begins)
        tables = np.zeros((len(lens), int(num_blocks.max())), np.int32)
        for row, begin, count in zip(tables, i.block_begins, num_blocks, strict=False):
            row[:count] = i.block_indices_N[begin : begin + count]
        sequence = np.repeat(np.arange(len(lens)), lens)
        blocks = tables[sequence, i.positions_T // size]
        decodes = bool((lens == 1).all())

        def on_device(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array.astype(np.int32))

        logits = self.model.forward(
            DeviceInputs(
                ids_T=on_device(i.ids_T),
                positions_T=on_device(i.positions_T),
                slots_T=on_device(blocks * size + i.positions_T % size),
                tables_SM=on_device(tables),
                lens_S=on_device(i.past_lens_S + 1) if decodes else None,
                token_begins=None if decodes else on_device(i.token_begins),
                past_lens_S=None if decodes else on_device(i.past_lens_S),
                max_query_len=int(lens.max()),
                take_L=on_device(i.take_L),
            )
        )
        return logits.float().numpy()

    def copy_blocks(self, sources: np.ndarray, targets: np.ndarray) -> None:
        self.model.blocks.copy(torch.from_numpy(sources), torch.from_numpy(targets))


def pair(workshop, shape, **precision):
    """Drivers of the reference and of the device's model on one engine."""
    reference = workshop.driver(shape, "torch", **precision)
    dtype, group_size = precision.get("dtype", "fp32"), precision.get("group_size", 0)
    kv_dtype = precision.get("kv_dtype", "fp32")
    folder = workshop.engine(shape, TorchLowering(), dtype, kv_dtype, group_size, precision.get("input_scale"))
    model = KernelModel.load(open_engine(folder, "torch"), torch.device("cpu"), torch.float32)
    model.blocks.allocate(reference.num_blocks)
    return reference, type(reference)(HostDriven(model))


def difference(drivers, new, samples=None):
    expected, found = (driver.step(new, samples) for driver in drivers)
    assert expected.keys() == found.keys()
    return max(np.abs(expected[name] - found[name]).max() for name in expected)


@pytest.mark.parametrize("shape", ["biases", "head-80", "llama3-rope", "mqa", "odd-sizes", "tied"])
def test_every_shape_gives_the_references_logits(workshop, random_ids, shape):
    """Odd sizes of heads, and what only some checkpoints have."""
    drivers = pair(workshop, shape)
    assert difference(drivers, {"a": random_ids(9, 1), "b": random_ids(3, 2)}) < 1e-4
    assert difference(drivers, {"a": [7], "b": [9]}) < 1e-4


def test_chunks_shared_blocks_and_forks_give_the_references_logits(workshop, random_ids):
    drivers = pair(workshop, "gqa")
    assert difference(drivers, {"a": random_ids(37, 1), "b": random_ids(3, 2)}) < 1e-4
    assert difference(drivers, {"a": [7], "b": random_ids(30, 3), "c": random_ids(33, 4)}) < 1e-4
    for driver in drivers:
        driver.share("a", "d", 1)
        driver.fork("c", "e")
    assert difference(drivers, {"a": [8], "b": [9], "c": [10], "e": [11]}) < 1e-4
    assert difference(drivers, {"d": random_ids(4, 5), "e": [12]}, {"d"}) < 1e-4


@pytest.mark.parametrize(
    "precision",
    [
        {"dtype": "fp8"},
        {"dtype": "fp8", "input_scale": 0.02},
        {"dtype": "int8"},
        {"dtype": "int8", "group_size": 32},
        {"dtype": "int4", "group_size": 32},
    ],
    ids=str,
)
def test_quantised_products_are_the_references(workshop, random_ids, precision):
    """The kernels' codes, scales and packing are those of the file. FP8 activations may round to the code beside."""
    drivers = pair(workshop, "quantisable", **precision)
    most = 0.25 if precision["dtype"] == "fp8" else 1e-3
    assert difference(drivers, {"a": random_ids(5, 1), "b": random_ids(2, 2)}) < most
    assert difference(drivers, {"a": [7], "b": [8]}) < most


def test_an_fp8_cache_is_the_references(workshop, random_ids, rounds_to_e4m3):
    """Written and read by both attentions, shared and copied: rounded once, to e4m3 at scale 1. Both may round a key to
    codes beside each other; a cache that was never rounded has no error at all."""
    drivers = pair(workshop, "gqa", kv_dtype="fp8")
    steps = ({"a": random_ids(37, 1), "b": random_ids(3, 2)}, {"a": [7], "b": random_ids(30, 3)}, {"a": [8], "b": [9]})
    exact = workshop.driver("gqa", "torch")
    for step in steps:
        expected, found, wide = (driver.step(step) for driver in (*drivers, exact))
        for name in expected:
            deviation = wide[name].std()
            assert np.abs(expected[name] - found[name]).max() < 0.05 * deviation
            assert 1e-3 < np.abs(expected[name] - wide[name]).mean() / deviation < 0.1
    for driver in drivers:
        driver.fork("a", "e")
    assert difference(drivers, {"a": [8], "e": [11]}) < 0.1


def test_values_beyond_e4m3_are_its_greatest(workshop):
    """Without a limit they are NaN, in the reference and on the card."""
    config = workshop.driver("gqa", "torch").model._config
    cache = BlockCache(config, "fp8", 1, 32)
    heads = torch.full((1, config.num_kv_heads, config.head_dim), 1000.0)
    place = torch.tensor([0]), torch.tensor([3])
    cache.write(0, place, heads, -heads)
    keys, values = cache.read(0, torch.tensor([[0]]), torch.float32)
    assert bool((keys[0, :, 3] == 448).all()) and bool((values[0, :, 3] == -448).all())


def test_an_element_of_an_fp8_cache_is_one_byte(workshop):
    """Capacity is computed from this number. A cache is never wider than the activations that fill it."""
    sizes = {}
    for dtype, kv_dtype in (("fp32", "fp8"), ("fp32", "fp32"), ("int8", "fp32")):
        folder = workshop.engine("quantisable", TorchLowering(), dtype, kv_dtype)
        sizes[dtype, kv_dtype] = KernelModel.load(open_engine(folder, "torch"), torch.device("cpu")).blocks
    config = sizes["fp32", "fp8"].config
    elements = 2 * config.num_layers * config.num_kv_heads * 32 * config.head_dim
    assert [blocks.bytes_per_block for blocks in sizes.values()] == [elements, 4 * elements, 2 * elements]
    reference = workshop.driver("quantisable", "torch", "fp32", "fp8").model
    assert reference.kv_bytes_per_block == elements
