"""A model cut for several ranks is the model: the same logits, the same text, from parts that make up the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageflight.core.errors import ConfigError
from pageflight.lowering.torch_lowering import TorchLowering
from pageflight.models.checkpoint import open_checkpoint
from pageflight.models.config import DecoderConfig
from pageflight.models.safetensors_file import SafetensorsWriter
from pageflight.models.sharding import Shard, Split, check_size
from pageflight.models.weights import EMBED, HEAD, LayerNames, expected_shapes
from pageflight.quant.convert import convert
from pageflight.quant.sharding import ShardStore, input_unit
from pageflight.quant.store import WeightStore

from .conftest import Driver, Workshop
from .thread_ranks import ThreadedRanks

FP32_TOLERANCE = 1e-4
SIZES = {
    "gqa": (2, 4),
    "mha": (4,),
    "mqa": (4,),
    "tied": (2,),
    "biases": (4,),
    "odd-sizes": (5,),
    "wide-heads": (2,),
}


@contextmanager
def ranks(
    workshop: Workshop,
    shape: str,
    size: int,
    dtype: str = "fp32",
    group_size: int = 0,
    num_stages: int = 1,
    **engine,
) -> Iterator[Driver]:
    folder = workshop.engine(shape, TorchLowering(), dtype, "fp32", group_size, **engine)
    model = ThreadedRanks(folder, size, num_stages)
    driver = Driver(model)
    model.allocate(driver.num_blocks, num_host_blocks=6)
    yield driver
    model.close()


def difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def check_same(whole: Driver, parts: Driver, random_ids: Callable[..., list[int]]) -> None:
    """Chunks, decode steps, rows that sample and rows that do not, a fork: the same logits and the same greedy text."""
    steps = [({"a": random_ids(40, 1), "b": random_ids(7, 2)}, None), ({"a": random_ids(30, 3), "b": [5]}, {"b"})]
    for new, samples in [*steps, ({"a": random_ids(3, 4)}, set()), ({"b": [6], "a": [7]}, None)]:
        expected, found = whole.step(new, samples), parts.step(new, samples)
        assert expected.keys() == found.keys()
        if found:
            assert difference(expected, found) <= FP32_TOLERANCE
    for driver in (whole, parts):
        driver.fork("a", "c")
        for _ in range(4):
            driver.step({"c": [int(driver.step({"a": [3]})["a"].argmax())]})
    assert whole.tokens["c"] == parts.tokens["c"]


STAGES = {"gqa": [(1, 2), (2, 2), (1, 3)], "tied": [(1, 2)], "biases": [(2, 2)], "odd-sizes": [(5, 2)]}
"""Ranks of a stage, and stages."""
CUTS = [(shape, size, 1) for shape, sizes in SIZES.items() for size in sizes]
CUTS += [(shape, *cut) for shape, cuts in STAGES.items() for cut in cuts]


@pytest.mark.parametrize(("shape", "size", "num_stages"), CUTS)
def test_ranks_have_the_logits_and_the_greedy_text_of_one(workshop, random_ids, shape, size, num_stages):
    """Heads, K/V heads shared by ranks, uneven MLPs and vocabularies, layers of a stage: any slice one off and the text
    is another."""
    whole = workshop.driver(shape, "torch")
    with ranks(workshop, shape, size, num_stages=num_stages) as parts:
        check_same(whole, parts, random_ids)


def test_a_layer_takes_two_sums_and_a_pass_two_words_more(workshop, random_ids):
    """A norm or a product that every rank could do alone must not be waited for."""
    with ranks(workshop, "gqa", 2) as parts:
        parts.step({"a": random_ids(9)})
        assert parts.model.group.num_calls == 2 * 3 + 2


@pytest.mark.parametrize(("dtype", "group_size"), [("int8", 0), ("int8", 32), ("int4", 64)])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_of_a_quantised_model_have_its_logits(workshop, random_ids, size, dtype, group_size):
    """Scales cut at the wrong group; four ranks cut through the groups of 64."""
    whole, new = workshop.driver("quantisable", "torch", dtype, group_size=group_size), {"a": random_ids(40, 1)}
    with ranks(workshop, "quantisable", size, dtype, group_size) as parts:
        assert difference(whole.step(new), parts.step(new)) <= FP32_TOLERANCE


@pytest.mark.parametrize(("size", "input_scale"), [(4, 0.05), (2, None)])
def test_ranks_of_an_fp8_model_are_as_near_to_the_exact_one(workshop, random_ids, size, input_scale):
    """Not the same logits: activations at the border of two codes fall to either side, and without calibrated scales a
    rank rounds by the peak of its own inputs."""
    new = {name: random_ids(40, seed) for seed, name in enumerate("abcd")}
    exact = workshop.driver("quantisable", "torch").step(new)
    whole = workshop.driver("quantisable", "torch", "fp8", input_scale=input_scale).step(new)
    with ranks(workshop, "quantisable", size, "fp8", input_scale=input_scale) as parts:
        found = parts.step(new)

    def error(logits: dict[str, np.ndarray]) -> float:
        return float(np.mean([np.square(logits[name] - exact[name]).mean() for name in new]) ** 0.5)

    assert 0 < error(found) <= 1.25 * error(whole)


decoders = st.builds(
    lambda group, kv_heads, head_dim, intermediate, vocab, tied, biased: DecoderConfig(
        family="llama",
        vocab_size=vocab,
        hidden_size=8,
        num_layers=1,
        num_heads=group * kv_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        max_positions=32,
        rms_norm_eps=1e-5,
        tied_head=tied,
        qkv_bias=biased,
        output_bias=biased,
        mlp_bias=biased,
    ),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([2, 4, 6]),
    st.integers(1, 40),
    st.integers(1, 60),
    st.booleans(),
    st.booleans(),
)


@given(config=decoders, data=st.data(), unit=st.sampled_from([1, 1, 2, 4]))
@settings(max_examples=150, deadline=None)
def test_parts_of_all_ranks_are_the_whole(config: DecoderConfig, data: st.DataObject, unit: int) -> None:
    """Any size that divides the heads: nothing is left out, only K/V heads are held twice, and every query of a rank
    meets the K/V head that it meets in the whole model."""
    config = replace(config, intermediate_size=config.intermediate_size * unit)  # groups divide the inputs
    size = data.draw(st.sampled_from([n for n in range(1, config.num_heads + 1) if config.num_heads % n == 0]))
    try:
        check_size(config, size, unit)
    except ConfigError as error:
        largest = int(str(error).split()[-1].rstrip("."))
        check_size(config, largest, unit)
        assert str(error).startswith(f"tensor_parallel={size}: ")
        return
    splits = [Split(config=config, shard=Shard(rank=rank, size=size), input_unit=unit) for rank in range(size)]
    names, shapes = LayerNames.of(0), expected_shapes(config)
    group = config.num_heads // config.num_kv_heads
    seen_queries, seen_inner, seen_ids = [], [], []
    for split in splits:
        cuts, local = split.cuts(), split.rank_config
        rows = np.concatenate([np.arange(shapes[names.qkv][0])[part] for part in cuts[names.qkv].rows])
        assert rows.size == local.q_size + 2 * local.kv_size
        queries, keys, values = np.split(rows, [local.q_size, local.q_size + local.kv_size])
        assert (queries == np.arange(config.q_size)[cuts[names.output].columns]).all()
        seen_queries += queries.tolist()
        met = np.repeat(keys.reshape(local.num_kv_heads, -1), local.num_heads // local.num_kv_heads, axis=0)
        wanted = config.q_size + (queries // config.head_dim // group) * config.head_dim + queries % config.head_dim
        assert (met.ravel() == wanted).all() and (values == keys + config.kv_size).all()
        gate, up = np.split(
            np.concatenate([np.arange(2 * config.intermediate_size)[part] for part in cuts[names.gate_up].rows]), 2
        )
        down = np.arange(config.intermediate_size)[cuts[names.down].columns]
        assert (gate == down).all() and (up == down + config.intermediate_size).all()
        assert down.size == local.intermediate_size > 0 and down[0] % min(unit, 2) == 0
        assert down[0] % unit == 0 or config.intermediate_size // unit < size, "a group is cut that need not be"
        seen_inner += down.tolist()
        (part,) = cuts[EMBED].rows
        assert cuts[HEAD] == cuts[EMBED] and part.stop > part.start
        seen_ids += range(part.start, part.stop)
    assert seen_queries == list(range(config.q_size))
    assert seen_inner == list(range(config.intermediate_size))
    assert seen_ids == list(range(config.vocab_size))
    assert len({split.rank_config.num_kv_heads for split in splits}) == 1, "all ranks have blocks of one size"


def test_a_size_that_does_not_work_is_refused_with_those_that_do(workshop: Workshop) -> None:
    workshop.reference("gqa")
    config, _ = open_checkpoint(workshop.folder / "gqa")
    with pytest.raises(ConfigError, match=r"tensor_parallel=3: must divide num_heads=4; sizes that work are 1, 2, 4"):
        check_size(config, 3)
    with pytest.raises(ConfigError, match=r"tensor_parallel=4: intermediate_size=3 is too small .* are 1, 2$"):
        check_size(replace(config, intermediate_size=3), 4)
    with pytest.raises(ConfigError, match=r"tensor_parallel=0: must be at least 1"):
        check_size(config, 0)


@pytest.mark.parametrize(("dtype", "group_size"), [("fp32", 0), ("bf16", 0), ("fp8", 0), ("int8", 32), ("int4", 64)])
def test_a_rank_reads_its_part_of_every_stored_form(
    workshop: Workshop, tmp_path: Path, dtype: str, group_size: int
) -> None:
    """Parts of codes with scales of others; and whole weights were copied to take a part of them."""
    workshop.reference("quantisable")
    config, checkpoint = open_checkpoint(workshop.folder / "quantisable")
    path = tmp_path / "model.safetensors"
    convert(checkpoint, config, path, dtype=dtype, group_size=group_size)
    store = WeightStore(path, config)
    for rank in range(4):
        split = Split(config=config, shard=Shard(rank=rank, size=4), input_unit=input_unit(dtype, group_size))
        part, cuts, num_bytes = ShardStore(store, split), split.cuts(), 0
        for name in expected_shapes(config):
            weight, whole, cut = part[name], store[name], cuts.get(name)
            values = whole.float32()
            if cut is not None and cut.rows:
                values = np.concatenate([values[run] for run in cut.rows])
            if cut is not None and cut.columns is not None:
                values = values[:, cut.columns]
            np.testing.assert_array_equal(weight.float32(), values, err_msg=name)
            is_view = np.shares_memory(weight.values, whole.values)
            assert is_view or (cut is not None and len(cut.rows) > 1), f"{name} was copied for nothing"
            num_bytes += weight.num_bytes if cut is not None else 0
        cut_bytes = sum(store[name].num_bytes for name in expected_shapes(config) if name in cuts)
        assert cut_bytes / 4 <= num_bytes <= cut_bytes / 4 * 1.2, "one K/V head of two is here twice"


def test_what_other_ranks_read_stays_on_the_disk(tmp_path: Path) -> None:
    """Each of eight ranks paged all of a model in that was eight times as large as its memory."""
    rows, columns = 4096, 1024
    path = tmp_path / "model.safetensors"
    config = DecoderConfig(
        family="llama",
        vocab_size=rows,
        hidden_size=columns,
        num_layers=0,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
        intermediate_size=8,
        max_positions=32,
        rms_norm_eps=1e-5,
        tied_head=True,
    )
    writer = SafetensorsWriter(path, {"embed": ("F32", (rows, columns)), "norm": ("F32", (columns,))}, {})
    writer.close()
    store = WeightStore(path, config)
    ShardStore(store, Split(config=config, shard=Shard(rank=3, size=4)))["embed"].values.sum()
    resident = resident_bytes(path)
    assert rows * columns <= resident <= 1.5 * rows * columns, "a quarter of four bytes each"


def resident_bytes(path: Path) -> int:
    """Of this process's mapping of a file."""
    lines = Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines()
    begin = next(index for index, line in enumerate(lines) if line.endswith(str(path)))
    return next(int(line.split()[1]) << 10 for line in lines[begin:] if line.startswith("Rss:"))
