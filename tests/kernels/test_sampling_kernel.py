"""The ids of the kernels against those of the host's sampler, which are the definition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from pageflight.core.plan import RowStart
from pageflight.core.request import SamplingParams
from pageflight.kernels import sampling
from pageflight.kernels.sampling_adjust import packed_counts, packed_lists
from pageflight.kernels.sampling_rows import uniform_of
from pageflight.sampling.adjustments import has_penalties
from pageflight.sampling.philox import uniforms
from pageflight.sampling.sampler import Sampler

FloatArray = np.ndarray
MAX_LEN = 64


class Both:
    """The same rows in the host's sampler and in the kernels' memory."""

    def __init__(self, rows: list[SamplingParams], vocab: int, tokens: list[tuple[list[int], list[int]]] | None = None):
        tokens = [([1, 2], []) for _ in rows] if tokens is None else tokens
        self.sampler = Sampler(max_num_seqs=len(rows), vocab_size=vocab)
        self.tokens_RM = np.zeros((len(rows), MAX_LEN), np.int32)
        self.num_tokens_R = np.zeros(len(rows), np.int32)
        self.parameters = sampling.RowParameters.empty(len(rows), "cpu")
        self.workspace = sampling.Workspace(len(rows), vocab, "cpu")
        self.lists: list[torch.Tensor | None] = []
        self.counts: list[torch.Tensor | None] = []
        for row, (params, (prompt, output)) in enumerate(zip(rows, tokens, strict=True)):
            ids = np.array([*prompt, *output], np.int32)
            self.tokens_RM[row, : ids.size], self.num_tokens_R[row] = ids, ids.size
            self.sampler.start(RowStart(row, row, row % 3, ids, len(prompt), params))
            packed = packed_lists(params, len(prompt), vocab)
            self.lists.append(None if packed is None else torch.from_numpy(packed))
            self.counts.append(None)
            if has_penalties(params):
                counted, times = packed_counts(ids, len(prompt))
                self.counts[row] = torch.zeros(vocab, dtype=torch.int32)
                self.counts[row][torch.from_numpy(counted).long()] = torch.from_numpy(times)
            floats, integers = sampling.packed(
                params, sequence_index=row % 3, lists=self.lists[row], counts=self.counts[row]
            )
            self.parameters.floats[row], self.parameters.integers[row] = floats, integers

    def sample(self, logits_LV: torch.Tensor, rows_L: torch.Tensor, **promises: bool) -> sampling.Sampled:
        """By the kernels."""
        state, num_tokens_R = torch.from_numpy(self.tokens_RM).flatten(), torch.from_numpy(self.num_tokens_R)
        return sampling.sample(
            logits_LV,
            rows_L,
            state,
            num_tokens_R,
            self.parameters,
            self.workspace,
            stride_tokens=MAX_LEN,
            **promises,
        )

    def step(self, logits_LV: FloatArray, rows: list[int] | None = None) -> tuple[list[int], list[int], FloatArray]:
        """Ids of the host, ids of the kernels, and the kernels' log probabilities."""
        rows_L = np.arange(len(logits_LV), dtype=np.int32) if rows is None else np.array(rows, np.int32)
        expected, log_probs = self.sampler.sample(logits_LV, rows_L, self.tokens_RM, self.num_tokens_R)
        found = self.sample(torch.from_numpy(logits_LV), torch.from_numpy(rows_L))
        self.tokens_RM[rows_L, self.num_tokens_R[rows_L]] = expected
        self.num_tokens_R[rows_L] += 1
        assert not found.are_bad_L.any()
        if log_probs is not None:
            asked = ~np.isnan(log_probs)
            np.testing.assert_allclose(found.log_probs_L.numpy()[asked], log_probs[asked], rtol=1e-5, atol=2e-6)
        return expected.tolist(), found.ids_L.tolist(), found.log_probs_L.numpy()


def random_logits(num_lines: int, vocab: int, seed: int = 0, spread: float = 2.0) -> FloatArray:
    return (np.random.default_rng(seed).standard_normal((num_lines, vocab)) * spread).astype(np.float32)


DRAWN = SamplingParams(temperature=1.0)
KINDS = [
    SamplingParams(),
    DRAWN,
    replace(DRAWN, temperature=0.3),
    replace(DRAWN, top_k=1),
    replace(DRAWN, top_k=2),
    replace(DRAWN, top_k=40),
    replace(DRAWN, top_k=100_000),
    replace(DRAWN, top_p=0.9),
    replace(DRAWN, top_p=1e-9),
    replace(DRAWN, top_p=0.999),
    replace(DRAWN, min_p=0.05),
    replace(DRAWN, min_p=1.0),
    replace(DRAWN, temperature=1.7, top_k=30, top_p=0.8, min_p=0.02),
    replace(DRAWN, temperature=5.0, top_k=30, top_p=0.8),
    replace(DRAWN, temperature=0.01, top_p=0.5),
]


@pytest.mark.parametrize("vocab", [3, 1025, 4097])
def test_ids_equal_those_of_the_host(vocab: int) -> None:
    """Two samplers that disagree make the text depend on where it was sampled."""
    rows = [replace(kind, seed=7 * number - 20, log_probs=True) for number, kind in enumerate(KINDS)]
    both = Both(rows, vocab)
    expected, found, _ = both.step(random_logits(len(rows), vocab))
    assert found == expected


@pytest.mark.parametrize("top_p", [0.95, 0.5])
@pytest.mark.parametrize("top_k", [0, 4500])
def test_more_candidates_than_the_list_holds(top_p: float, top_k: int) -> None:
    """A flat distribution keeps more ids than fit; those behind the list's end were never drawn."""
    vocab, count = 5000, 2
    rows = [replace(DRAWN, top_p=top_p, top_k=top_k, seed=number) for number in range(count)]
    expected, found, _ = Both(rows, vocab).step(random_logits(count, vocab, spread=0.1))
    assert found == expected


@pytest.mark.parametrize("vocab", [7, 1500])
def test_ties_are_kept_as_the_host_keeps_them(vocab: int) -> None:
    """All of those with the k-th score; at the border of top-p those with the highest ids."""
    params = [replace(DRAWN, top_k=3), replace(DRAWN, top_p=0.4), replace(DRAWN, top_p=0.6, top_k=5), DRAWN]
    rows = [replace(params[number % 4], seed=number) for number in range(8)]
    both = Both(rows, vocab)
    expected, found, _ = both.step(np.zeros((8, vocab), np.float32))
    assert found == expected
    rounded = np.round(random_logits(8, vocab, spread=1.0))
    expected, found, _ = both.step(rounded)
    assert found == expected


def test_equal_logits_under_top_p_leave_the_highest_ids() -> None:
    rows = [replace(DRAWN, top_p=0.25, seed=number) for number in range(6)]
    expected, found, _ = Both(rows, 8).step(np.zeros((6, 8), np.float32))
    assert found == expected and set(found) == {6, 7}


@pytest.mark.parametrize("params", [SamplingParams(), DRAWN, replace(DRAWN, top_k=4), replace(DRAWN, top_p=0.7)])
def test_ids_of_minus_infinity_are_never_chosen(params: SamplingParams) -> None:
    """Guided decoding forbids all but a few; distances to them are infinite, and inf - inf is no number."""
    logits = np.full((3, 4500), -np.inf, np.float32)
    logits[:, [5, 4400]] = random_logits(3, 2)
    rows = [replace(params, seed=number, log_probs=True) for number in range(3)]
    expected, found, _ = Both(rows, 4500).step(logits)
    assert found == expected and set(found) <= {5, 4400}


def test_penalties_and_listed_ids_change_the_scores_as_on_the_host() -> None:
    """Bias comes before the penalties, counts are of the output alone, and the log probability is the model's own."""
    vocab = 4100
    bias = ((3, 2.5), (4099, 4.0), (7, -np.inf), (9, -100.0))
    kinds = [
        SamplingParams(repetition_penalty=1.5, log_probs=True),
        replace(DRAWN, repetition_penalty=0.7, top_k=5),
        replace(DRAWN, presence_penalty=1.5, frequency_penalty=-0.5, top_p=0.9, log_probs=True),
        SamplingParams(logit_bias=bias, frequency_penalty=2.0),
        replace(DRAWN, logit_bias=bias, log_probs=True),
        replace(DRAWN, logit_bias=bias, repetition_penalty=1.3, top_p=0.5),
        DRAWN,
        SamplingParams(),
    ]
    rows = [replace(kind, seed=number) for number, kind in enumerate(kinds)]
    tokens = [([3, 5, 4000], [5, 5, 7, 4099]) for _ in rows]
    both = Both(rows, vocab, tokens)
    logits = random_logits(len(rows), vocab, spread=1.0)
    logits[:, [3, 5, 4000, 4099]] += 5.0
    for _ in range(2):
        expected, found, _ = both.step(logits)
        assert found == expected


def test_counts_follow_what_is_sampled_and_begin_with_what_a_row_brings() -> None:
    """A resumed row that starts from zero may repeat what it was told to avoid."""
    rows = [SamplingParams(presence_penalty=1.0), SamplingParams()]
    both = Both(rows, 10, [([3, 4, 3], [4, 6, 6]), ([3], [])])
    assert both.counts[0] is not None and both.counts[1] is None, "a row without penalties has no counts"
    assert both.counts[0].tolist() == [0, 0, 0, 1, 3, 0, 4, 0, 0, 0]
    logits = np.zeros((2, 10), np.float32)
    logits[:, 8] = 1.0
    both.step(logits)
    assert both.counts[0].tolist() == [0, 0, 0, 1, 3, 0, 4, 0, 2, 0]


def test_where_nothing_is_allowed_the_logits_count_unchanged() -> None:
    vocab = 5
    forbidden = tuple((token, -np.inf) for token in range(vocab))
    rows = [SamplingParams(logit_bias=forbidden), replace(DRAWN, logit_bias=forbidden, seed=4)]
    expected, found, _ = Both(rows, vocab).step(random_logits(2, vocab))
    assert found == expected


def test_a_bias_that_overflows_is_the_greatest_number() -> None:
    rows = [SamplingParams(logit_bias=((2, 3e38),)), replace(DRAWN, logit_bias=((2, 3e38),))]
    logits = np.full((2, 5), 1e38, np.float32)
    with np.errstate(over="ignore"):
        expected, found, _ = Both(rows, 5).step(logits)
    assert found == expected == [2, 2]


@pytest.mark.parametrize("bad", [np.nan, np.inf, "all -inf"])
def test_bad_lines_are_flagged_and_disturb_no_other(bad: float | str) -> None:
    """argmax passes a NaN by: text came out of a broken model. Their counts stay as they were."""
    vocab = 4200
    kinds = [SamplingParams(), DRAWN, replace(DRAWN, top_k=5), replace(DRAWN, top_p=0.5, presence_penalty=1.0)]
    both = Both([kind for kind in kinds for _ in range(2)], vocab)
    good = random_logits(8, vocab)
    logits = good.copy()
    logits[::2] = logits[::2] if not isinstance(bad, str) else -np.inf
    if not isinstance(bad, str):
        logits[::2, 4150] = bad
    found = both.sample(torch.from_numpy(logits), torch.arange(8, dtype=torch.int32))
    assert found.are_bad_L.tolist() == [True, False] * 4
    assert bool(found.log_probs_L.isnan()[::2].all()) and not bool(found.log_probs_L.isnan()[1::2].any())
    assert bool(((found.ids_L >= 0) & (found.ids_L < vocab)).all()), "an id beyond the vocabulary reads other memory"
    assert both.counts[6] is not None and both.counts[7] is not None
    assert both.counts[6].sum() == 2 and both.counts[7].sum() == 4
    expected, _ = both.sampler.sample(good[1::2], np.arange(1, 8, 2, dtype=np.int32), both.tokens_RM, both.num_tokens_R)
    assert found.ids_L[1::2].tolist() == expected.tolist()


def test_lines_of_no_row_are_left_out() -> None:
    """A captured graph always has all its lines; those without a row once overwrote row -1, the last one."""
    both = Both([DRAWN, replace(DRAWN, top_p=0.5, presence_penalty=1.0)], 20)
    logits = torch.full((4, 20), float("nan"))
    logits[2] = torch.from_numpy(random_logits(1, 20))[0]
    rows = torch.tensor([-1, -1, 0, -1], dtype=torch.int32)
    both.workspace = sampling.Workspace(4, 20, "cpu")
    found = both.sample(logits, rows)
    expected, _ = both.sampler.sample(logits[2:3].numpy(), np.zeros(1, np.int32), both.tokens_RM, both.num_tokens_R)
    assert found.ids_L.tolist() == [0, 0, int(expected[0]), 0]
    assert not found.are_bad_L.any()
    assert both.counts[1] is not None and both.counts[1].sum() == 2


def test_a_line_gets_the_same_id_in_any_company_and_order() -> None:
    """Sums in another order round differently; as whole numbers they cannot."""
    rows = [replace(kind, seed=3 * number) for number, kind in enumerate(KINDS[7:])]
    logits = random_logits(len(rows), 4500)
    _, together, _ = Both(rows, 4500).step(logits)
    order = np.random.default_rng(1).permutation(len(rows)).tolist()
    _, shuffled, _ = Both(rows, 4500).step(logits[order], order)
    assert shuffled == [together[row] for row in order]
    row = len(rows) - 3
    _, alone, _ = Both(rows, 4500).step(logits[row : row + 1], [row])
    assert alone == [together[row]]


def test_logits_in_half_precision_and_part_of_wider_lines() -> None:
    rows = [replace(kind, seed=number) for number, kind in enumerate(KINDS[1::3])]
    both, wide = Both(rows, 100), torch.zeros(len(rows), 160, dtype=torch.float16)
    wide[:, :100] = torch.from_numpy(random_logits(len(rows), 100)).half()
    wide[:, 100:] = 100.0
    found = both.sample(wide[:, :100], torch.arange(len(rows), dtype=torch.int32)).ids_L.tolist()
    expected, also, _ = both.step(wide[:, :100].float().numpy())
    assert found == also == expected


def test_rows_without_lists_counts_and_filters_need_none_of_their_kernels() -> None:
    rows = [replace(DRAWN, seed=3), SamplingParams()]
    both = Both(rows, 70)
    logits = random_logits(2, 70)
    rows_L = torch.arange(2, dtype=torch.int32)
    found = both.sample(torch.from_numpy(logits), rows_L, filters=False, adjusts=False)
    assert found.ids_L.tolist() == both.step(logits)[0]


def test_every_list_is_obeyed_wherever_its_ids_are() -> None:
    """Borders of chunks and tiles, ids named twice or unknown, words longer than the row, and a minimum that passes."""
    vocab = 4300
    rng = np.random.default_rng(3)
    tokens = [([1, 2, 3], [4, 5]), ([7, 8] * 9, [4097, 4095, 4096])]
    many = tuple((int(token), float(rng.normal())) for token in rng.integers(-5, vocab + 5, 700))
    whole = tuple((token, float(value)) for token, value in enumerate(rng.normal(size=vocab)))
    words = ((4, 5, 6), (5, 6), (5, 4099), (4, 6, 4098), (4095, 4096, 4200), (7, 8, 1), (4294,), (5, 9999), (-1,))
    stops = {"stop_token_ids": (6, 4200, 9999), "min_tokens": 4}
    kinds = [
        SamplingParams(logit_bias=((4095, 3.0), (4096, 1e-8), (4096, 4.0), (4096, -1e-8), (-1, 9.0), (9999, 9.0))),
        SamplingParams(logit_bias=many),
        replace(DRAWN, logit_bias=whole, bad_words_ids=words),
        SamplingParams(bad_words_ids=words),
        SamplingParams(**stops),
        replace(DRAWN, **stops, bad_words_ids=words, logit_bias=many, frequency_penalty=0.7, repetition_penalty=1.2),
    ]
    rows = [replace(kind, seed=number) for number, kind in enumerate(kinds * 2)]
    both = Both(rows, vocab, [tokens[number // len(kinds)] for number in range(len(rows))])
    for step in range(4):
        logits = random_logits(len(rows), vocab, seed=step, spread=1.0)
        logits[:, [6, 4098, 4099, 4200, 4294]] += 7.0 + rng.normal(size=(len(rows), 5)).astype(np.float32)
        expected, found, _ = both.step(logits)
        assert found == expected, step


def test_no_lines_are_no_launch() -> None:
    """A grid of nothing is an error of CUDA."""
    both = Both([DRAWN], 10)
    empty = torch.empty(0, dtype=torch.int32)
    found = both.sample(torch.empty(0, 10), empty)
    assert found.ids_L.shape == (0,)


@triton.jit
def uniform_kernel(integers, positions, out):
    row = tl.program_id(0)
    tl.store(out + row, uniform_of(integers, row, tl.load(positions + row)))


def test_random_numbers_are_those_of_the_host_to_the_last_bit() -> None:
    """A stream of its own would change a sequence that moves between host and device."""
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 123456789012345]
    indices = [0, 5, 2**31 - 1, 3, 1, 0]
    positions = [0, 7, 131071, 1, 2, 2**31 - 1]
    lines = [sampling.packed(SamplingParams(seed=seed), index)[1] for seed, index in zip(seeds, indices, strict=True)]
    found = torch.empty(len(seeds), dtype=torch.float64)
    uniform_kernel[(len(seeds),)](torch.stack(lines), torch.tensor(positions, dtype=torch.int32), found)
    words = [np.array([value & 0xFFFF_FFFF_FFFF_FFFF for value in values], np.uint64) for values in (seeds, indices)]
    assert found.tolist() == uniforms(*words, np.array(positions, np.uint64)).tolist()
