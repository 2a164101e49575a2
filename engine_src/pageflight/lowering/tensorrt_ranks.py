"""One rank's part of a decoder as TensorRT's networks want it: sizes and bits of weights, and where sums are.

All ranks have as many rows of the vocabulary, the last one's with zeros behind them, so that engines without weights
in them fit every rank wherever the sizes of the others are equal.

Shapes: N outputs, K inputs, G groups of inputs per output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pageflight.models.sharding import Split, rows_per_rank
from pageflight.models.weights import EMBED, HEAD
from pageflight.quant.forms import WeightForm, input_scale_name, scale_name
from pageflight.quant.sharding import ShardStore, cut_form
from pageflight.quant.store import WeightStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint:
    """How the networks of one of `size` ranks meet the others': products with `sums` are parts of a sum over ranks,
    which is a layer `inside` a network or stands between two."""

    size: int
    sums: frozenset[str]
    inside: bool

    @classmethod
    def of(cls, split: Split, *, inside: bool) -> Joint:
        return cls(size=split.shard.size, sums=split.sums, inside=inside)


class RankTensors:
    """The stored tensors of one rank by name: its parts of weights, scales and calibrations. `forms` has their sizes.

    Keep it while they are in use: most are views of the file that all ranks map.
    """

    def __init__(self, store: WeightStore, split: Split) -> None:
        self._store, self._shards = store, ShardStore(store, split)
        self._num_rows = rows_per_rank(split.config.vocab_size, split.shard.size)
        cuts = split.cuts()
        self.forms = {name: cut_form(form, cuts[name]) if name in cuts else form for name, form in store.forms.items()}
        for name in (EMBED, HEAD):
            if name in self.forms:
                self.forms[name] = self._padded_form(self.forms[name])

    def stored_name(self, name: str) -> str:
        return self._store.stored_name(name)

    def tensor(self, name: str) -> NDArray[Any]:
        """A stored tensor as it is, cut: a weight's values, its scales, its input scale."""
        weight = self.stored_name(name)
        for of in (scale_name, input_scale_name):
            weight = weight.removesuffix(of(""))
        part = self._shards[weight]
        if name == input_scale_name(weight):
            return self._store.tensor(name)
        array = part.scales if name == scale_name(weight) else part.values
        assert array is not None, name
        if weight in (EMBED, HEAD) and len(array) < self._num_rows and len(array) == len(part.values):
            array = np.concatenate([array, np.zeros((self._num_rows - len(array), *array.shape[1:]), array.dtype)])
        return array

    def _padded_form(self, form: WeightForm) -> WeightForm:
        scales = form.scales
        if scales is not None and scales[0] == form.shape[0]:
            scales = (self._num_rows, scales[1])
        return WeightForm(form.dtype, (self._num_rows, *form.shape[1:]), scales, form.input_scale)
