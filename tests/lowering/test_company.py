"""Deterministic engines: every row as if it were alone, bit for bit, in whatever company and however it was chunked."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from pageflight.core.errors import ConfigError
from pageflight.lowering import registry
from pageflight.lowering.company import Company, sizes_to_try
from pageflight.lowering.padded import PaddedModel
from pageflight.lowering.passes import Run, pack, split
from pageflight.sched.borders import FixedBorders

NUM_BLOCKS = 120
PRECISIONS = [
    ("fp32", "fp32", 0),
    ("fp32", "u8", 0),
    ("bf16", "native", 0),
    ("bf16", "u8", 0),
    ("int8", "native", 0),
    ("int8", "native", 32),
    ("int8", "u8", 0),
]


@dataclass
class Text:
    """Known tokens of a sequence: `num_prompt` of them, then output. `logits` by the number of tokens before them."""

    ids: list[int]
    num_prompt: int
    table: list[int] = field(default_factory=list)
    computed: int = 0
    logits: dict[int, np.ndarray] = field(default_factory=dict)


class Player:
    """Computes texts on a deterministic model by fixed borders; how much of which text is up to the caller."""

    def __init__(self, model) -> None:
        self.model, self.borders = model, FixedBorders(model.block_size, model.replay_rows)

    def runs(self, text: Text, budget: int) -> list[Run]:
        """What `text` computes next within `budget`; output tokens are runs of their own."""
        begin = text.computed
        length = self.borders.length(begin, text.num_prompt, len(text.ids), budget)
        if begin < text.num_prompt:
            return [Run(text.ids[begin : begin + length], begin, text.table)] if length else []
        return [Run(text.ids[p : p + 1], p, text.table) for p in range(begin, begin + length)]

    def step(self, runs: list[tuple[Text, list[Run]]]) -> None:
        self.model.start(pack([run for _, of_text in runs for run in of_text], self.model.block_size))
        lines = iter(self.model.wait().copy())
        for text, of_text in runs:
            for run in of_text:
                text.computed += len(run.ids)
                text.logits[text.computed] = next(lines)

    def alone(self, text: Text) -> None:
        """One block, then one token, at a time."""
        while text.computed < len(text.ids):
            budget = self.model.block_size if text.computed < text.num_prompt else 1
            self.step([(text, self.runs(text, budget))])

    def together(self, texts: list[Text], random: np.random.Generator, most: int) -> None:
        """Any order, any number of texts, any budgets."""
        while open_texts := [text for text in texts if text.computed < len(text.ids)]:
            chosen = random.permutation(len(open_texts))[: random.integers(1, len(open_texts) + 1)]
            left, runs = most, []
            for index in chosen.tolist():
                of_text = self.runs(open_texts[index], min(left, int(random.integers(1, most + 1))))
                left -= sum(len(run.ids) for run in of_text)
                runs += [(open_texts[index], of_text)] if of_text else []
            if runs:
                self.step(runs)


def deterministic_model(workshop, shape, lowering, dtype, kv_dtype, group_size=0):
    key = ("deterministic", shape, lowering, dtype, kv_dtype, group_size)
    if key not in workshop.cache:
        target = registry.get(lowering)
        model = target.load(workshop.engine(shape, target, dtype, kv_dtype, group_size), num_threads=2)
        model = target.deterministic(model, name=f"{dtype} {kv_dtype}", max_num_tokens=200)
        model.allocate(NUM_BLOCKS)
        workshop.cache[key] = model
    return workshop.cache[key]


def texts_of(lengths: list[int], num_output: int, vocab_size: int, random: np.random.Generator) -> list[Text]:
    """New copies of the same texts in other blocks at each call with the same `lengths`."""
    blocks = random.permutation(NUM_BLOCKS).tolist()
    words = np.random.default_rng(8)
    texts = [Text(words.integers(2, vocab_size, n + num_output).tolist(), n) for n in lengths]
    for text in texts:
        text.table = [blocks.pop() for _ in range(-(-len(text.ids) // 32))]
    return texts


def check(model, lengths, num_output, seed, most):
    """The same texts alone, and twice in random company over blocks full of what was there before."""
    random = np.random.default_rng(seed)
    expected = texts_of(lengths, num_output, model.vocab_size, random)
    for text in expected:
        Player(model).alone(text)
    spread = np.stack([logits for text in expected for logits in text.logits.values()])
    assert np.isfinite(spread).all() and spread.std() > 0.3, "a model without contrast proves nothing"
    compared = 0
    for _ in range(2):
        found = texts_of(lengths, num_output, model.vocab_size, random)
        Player(model).together(found, random, most)
        for one, other in zip(expected, found, strict=True):
            for end in other.logits.keys() & one.logits.keys():
                compared += 1
                assert np.array_equal(one.logits[end], other.logits[end]), f"{one.num_prompt} tokens, after {end}"
    assert compared > len(lengths) * num_output


@pytest.mark.parametrize(("dtype", "kv_dtype", "group_size"), PRECISIONS)
def test_company_chunking_and_place_change_no_bit(workshop, dtype, kv_dtype, group_size):
    """With two threads a lone row's attention was split between them; a u8 block depended on how it was filled."""
    model = deterministic_model(workshop, "long", "openvino", dtype, kv_dtype, group_size)
    check(model, [1, 2, 31, 32, 33, 64, 65, 97, 200, 511], 12, seed=1, most=150)


@pytest.mark.parametrize(("dtype", "kv_dtype"), [("fp32", "fp32"), ("int8", "native"), ("int8", "u8")])
def test_long_contexts_change_no_bit(workshop, dtype, kv_dtype):
    check(deterministic_model(workshop, "long", "openvino", dtype, kv_dtype), [1500, 1025, 40], 8, seed=2, most=200)


@pytest.mark.parametrize("shape", ["gqa", "mqa", "biases", "head-80", "odd-sizes"])
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_no_shape_changes_a_bit(workshop, shape, dtype):
    """Sizes that are no multiple of a vector have tails with code of their own."""
    check(deterministic_model(workshop, shape, "openvino", dtype, "native"), [1, 33, 64, 90], 6, seed=3, most=110)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("kv_dtype", ["native", "u8"])
def test_torch_computes_every_sequence_alone(workshop, dtype, kv_dtype):
    check(deterministic_model(workshop, "quantisable", "torch", dtype, kv_dtype), [1, 33, 70], 3, seed=4, most=110)


def test_every_size_of_a_pass_gives_a_row_the_same_bits(workshop):
    """The kernel of a product is chosen by its number of rows: none of them may round otherwise."""
    for dtype in ("fp32", "int8"):
        model = deterministic_model(workshop, "long", "openvino", dtype, "native")
        meeting = Company(model, range(5))
        assert meeting.first_difference(range(1, 201)) is None


def test_output_tokens_of_one_pass_may_follow_each_other_unless_the_cache_is_quantised(workshop):
    """A u8 block is scaled anew by every token that comes into it, so they must come one after the other."""
    assert deterministic_model(workshop, "long", "openvino", "fp32", "fp32").replay_rows > 1
    assert deterministic_model(workshop, "long", "openvino", "int8", "native").replay_rows > 1
    assert deterministic_model(workshop, "long", "openvino", "fp32", "u8").replay_rows == 1


class Counting:
    """A CompiledModel that counts the tokens of its passes into the logits, below or up to any number of them."""

    block_size, vocab_size, kv_bytes_per_block, token_tile, replay_rows = 32, 5, 1, 1, 1

    def __init__(self, *, splits_below: int, num_threads: int = 1) -> None:
        self._splits_below, self.num_threads = splits_below, num_threads
        self.sizes: list[tuple[int, int]] = []

    def allocate(self, num_blocks: int, num_host_blocks: int = 0) -> None: ...

    def start(self, inputs) -> None:
        self._inputs = inputs
        self.sizes.append((len(inputs.ids_T), len(inputs.past_lens_S)))

    def wait(self) -> np.ndarray:
        size, taken = len(self._inputs.ids_T), self._inputs.take_L
        noise = min(size, len(taken)) if min(size, len(taken)) < self._splits_below else 0
        return (self._inputs.ids_T[taken, None] + np.zeros(self.vocab_size) + noise / 1024).astype(np.float32)

    def copy_blocks(self, sources, targets) -> None: ...

    def close(self) -> None: ...


def test_an_engine_that_rounds_small_passes_otherwise_gets_them_filled_up() -> None:
    model = Counting(splits_below=40)
    filled = PaddedModel(model, name="counting", max_num_tokens=300)
    filled.allocate(10)
    filled.start(pack([Run([3], 0, [0]), Run([4], 0, [1])], 32))
    assert filled.wait().tolist() == [[3.0] * 5, [4.0] * 5]
    assert model.sizes[-1] == (64, 3)


def test_an_engine_in_which_company_is_always_heard_is_refused_by_name() -> None:
    model = PaddedModel(Counting(splits_below=1000, num_threads=7), name="lowering counting", max_num_tokens=300)
    with pytest.raises(ConfigError, match=r"deterministic=True: .*lowering counting.*num_threads=7.*pass of"):
        model.allocate(10)


def test_a_pass_that_threads_would_split_gets_a_chunk_of_two_tokens() -> None:
    """Attention splits a row's context between threads when there are fewer rows than threads and no chunk."""
    model = Counting(splits_below=0, num_threads=4)
    filled = PaddedModel(model, name="counting", max_num_tokens=300)
    filled.allocate(10)
    rows = [Run([3], number, [number]) for number in range(4)]
    for runs, expected in ((rows[:3], (5, 4)), (rows, (4, 4)), ([Run([3, 4], 0, [0])], (2, 1))):
        filled.start(pack(runs, 32))
        assert model.sizes[-1] == expected
        assert len(filled.wait()) == len(runs)


def test_the_trial_finds_an_attention_that_threads_split(workshop):
    """Without it an engine with more threads than it says would serve, and round as its threads happen to run."""
    target = registry.get("openvino")
    model = target.load(workshop.engine("long", target, "fp32", "fp32"), num_threads=2)
    if model.num_threads < 2:
        pytest.skip("one core only: nothing is split")
    model.num_threads = 1
    padded = target.deterministic(model, name="fp32", max_num_tokens=100)
    padded.allocate(8)
    padded.num_threads, padded._least_rows = 1, 1  # what it says, with nothing filled up
    assert Company(padded, range(5)).first_difference(sizes_to_try(100, 1)) is not None
    model.close()


def test_passes_are_split_at_block_borders_and_keep_their_logits() -> None:
    inputs = pack([Run(range(70), 0, [5, 6, 7]), Run([1], 40, [8, 9]), Run([2, 3], 64, [1, 2, 3], takes=False)], 32)
    pieces = list(split(inputs, 32))
    assert [len(piece.ids_T) for piece, _ in pieces] == [32, 32, 6, 1, 2]
    assert [piece.take_L.tolist() for piece, _ in pieces] == [[], [], [5], [0], []]
    assert [(lines.start, lines.stop) for _, lines in pieces] == [(0, 0), (0, 0), (0, 1), (1, 2), (2, 2)]
    assert [piece.block_indices_N.tolist() for piece, _ in pieces] == [[5], [5, 6], [5, 6, 7], [8, 9], [1, 2, 3]]
    assert [int(piece.past_lens_S[0]) for piece, _ in pieces] == [0, 32, 64, 40, 64]


def test_the_largest_pass_and_the_number_of_threads_are_tried() -> None:
    assert {1, 287, 47, 48, 49} <= set(sizes_to_try(287, 48))
    assert max(sizes_to_try(20, 48)) == 20
