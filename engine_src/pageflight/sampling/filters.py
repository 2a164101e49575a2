"""Which ids of one row may be drawn, how likely each is, and the draw itself.

Everything here works on one row at a time: a row's 128 KB of logits stay in the core's own cache from pass to pass, and
its arithmetic cannot depend on its neighbours. V vocabulary, N candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatRow = NDArray[np.float32]

_GROUP_MEMBERS = 128
_DIRECT_SORT = 2048  # below this a plain sort is cheapest
_BUCKET_SHIFT = 18  # keeps sign, exponent and five bits of the fraction of a float32
_DRAW_BLOCK = 256


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """What is left to draw from: ids in ascending order (None: all of them) and their unnormalised probabilities.

    `weights_N` is 1 for the likeliest id.
    """

    ids_N: NDArray[np.int64] | None
    weights_N: FloatRow

    def draw(self, uniform: float) -> int:
        """Inverse of the cumulative distribution, in the order of ids, at `uniform` in [0, 1)."""
        index = draw_index(self.weights_N, uniform)
        return index if self.ids_N is None else int(self.ids_N[index])


def candidates(
    scores_V: FloatRow, peak: float, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Candidates:
    """Temperature, then min-p, top-k and top-p, in vLLM's order, each seeing what the ones before it left.

    `peak` is the greatest score (finite). Ties with the k-th score are all kept, as in transformers and vLLM; among
    ties at the border of top-p the higher ids are kept, as a stable ascending sort keeps them there. `min_p` drops ids
    less likely than `min_p` times the likeliest (Nguyen et al., 2024); `top_p` keeps the smallest set of likeliest ids
    that holds at least `top_p` of what is left (Holtzman et al., 2020), never less than one id.
    """
    scaled_V = scores_V - np.float32(peak)  # before the division: no temperature can overflow it upwards
    with np.errstate(over="ignore"):  # a tiny temperature sends the others to -inf, which is what it means
        np.divide(scaled_V, np.float32(temperature), out=scaled_V)
    ids_N: NDArray[np.int64] | None = None
    if 0 < top_k < scaled_V.size:
        ids_N = _at_least_kth(scaled_V, top_k)
        weights_N = np.exp(scaled_V[ids_N])
    else:
        weights_N = np.exp(scaled_V, out=scaled_V)
    if min_p > 0.0:
        ids_N, weights_N = _select(ids_N, weights_N, weights_N >= np.float32(min_p))
    if top_p < 1.0:
        ids_N, weights_N = _select(ids_N, weights_N, _nucleus(weights_N, top_p))
    return Candidates(ids_N, weights_N)


def draw_index(weights_N: FloatRow, uniform: float) -> int:
    """Index i such that cumulative[i - 1] <= uniform * total < cumulative[i]; never one of weight 0."""
    if weights_N.size <= 2 * _DRAW_BLOCK:
        return _search(weights_N, uniform * float(weights_N.sum(dtype=np.float64)))
    whole = weights_N.size // _DRAW_BLOCK * _DRAW_BLOCK
    doubles = weights_N.astype(np.float64)
    sums = doubles[:whole].reshape(-1, _DRAW_BLOCK).sum(axis=1)
    if whole < doubles.size:
        sums = np.append(sums, doubles[whole:].sum())
    ends = np.cumsum(sums)
    target = uniform * float(ends[-1])
    block = min(int(np.searchsorted(ends, target, side="right")), ends.size - 1)
    while sums[block] == 0.0:  # rounding put the target behind the last block that weighs anything
        block -= 1
    begin = block * _DRAW_BLOCK
    before = float(ends[block - 1]) if block else 0.0
    return begin + _search(weights_N[begin : begin + _DRAW_BLOCK], target - before)


def _search(weights_N: FloatRow, target: float) -> int:
    ends = np.cumsum(weights_N, dtype=np.float64)
    index = int(np.searchsorted(ends, target, side="right"))
    return index if index < ends.size else int(np.flatnonzero(weights_N)[-1])


def _select(
    ids_N: NDArray[np.int64] | None, weights_N: FloatRow, keep_N: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], FloatRow]:
    kept = np.flatnonzero(keep_N)
    return (kept if ids_N is None else ids_N[kept]), weights_N[kept]


def _at_least_kth(scaled_V: FloatRow, top_k: int) -> NDArray[np.int64]:
    """Ids whose score is at least the k-th greatest.

    k groups whose greatest members reach a bound hold k ids that reach it: so the k-th greatest of the groups' maxima
    is a lower bound of the k-th greatest score, and the exact selection has only the few ids above it to look at.
    """
    num_groups = scaled_V.size // _GROUP_MEMBERS
    if top_k > num_groups:
        kth = np.partition(scaled_V, scaled_V.size - top_k)[scaled_V.size - top_k]
        return np.flatnonzero(scaled_V >= kth)
    maxima = scaled_V[: num_groups * _GROUP_MEMBERS].reshape(_GROUP_MEMBERS, num_groups).max(axis=0)
    bound = np.partition(maxima, num_groups - top_k)[num_groups - top_k]
    ids_N = np.flatnonzero(scaled_V >= bound)
    scores_N = scaled_V[ids_N]
    kth = np.partition(scores_N, scores_N.size - top_k)[scores_N.size - top_k]
    return np.compress(scores_N >= kth, ids_N)


def _nucleus(weights_N: FloatRow, top_p: float) -> NDArray[np.bool_]:
    """Which ids belong to the smallest set, taken from the likeliest down, that holds `top_p` of the total."""
    total = float(weights_N.sum(dtype=np.float64))
    # N ids of at most (1 - p) * total / N weigh at most (1 - p) * total together: all of them lie outside. In a peaked
    # distribution that leaves a handful to sort. Half of it leaves room for rounding.
    floor = np.float32(0.5 * (1.0 - top_p) * total / weights_N.size)
    sizable = weights_N[weights_N > floor]
    above = 0.0
    if sizable.size > _DIRECT_SORT:
        sizable, above = _border_bucket(sizable, top_p * total)
    descending = np.sort(sizable)[::-1]
    ends = np.cumsum(descending, dtype=np.float64) + above
    count = min(int(np.searchsorted(ends, top_p * total, side="left")) + 1, descending.size)
    border = descending[count - 1]
    keep_N: NDArray[np.bool_] = weights_N > border
    num_ties = count - int(np.count_nonzero(descending > border))
    keep_N[np.flatnonzero(weights_N == border)[-num_ties:]] = True
    return keep_N


def _border_bucket(weights_N: FloatRow, target: float) -> tuple[FloatRow, float]:
    """The weights among which the cumulative sum from the greatest down reaches `target`, and the sum of all greater.

    Positive floats order as their bits do: a histogram over the leading bits replaces most of the sort.
    """
    keys = weights_N.view(np.int32) >> _BUCKET_SHIFT
    sums = np.bincount(keys.astype(np.int64), weights=weights_N.astype(np.float64))
    from_top = np.cumsum(sums[::-1])
    bucket = int(np.searchsorted(from_top, target, side="left"))
    while bucket >= from_top.size or sums[sums.size - 1 - bucket] == 0.0:  # rounding: the target lies behind the last
        bucket -= 1
    above = float(from_top[bucket - 1]) if bucket else 0.0
    return weights_N[keys == sums.size - 1 - bucket], above
