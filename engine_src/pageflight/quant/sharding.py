"""One rank's part of an engine's weights, read from the one file that all ranks map."""

from __future__ import annotations

from math import gcd, lcm

from pageflight.models.sharding import Cut, Split
from pageflight.quant.forms import WeightForm
from pageflight.quant.store import WeightStore
from pageflight.quant.weight import Weight


class ShardStore:
    """Weights by name as `split` cuts them. Those cut in one run are views: what no rank reads is never touched.

    Scales are cut along. Keep the store while its weights are in use.
    """

    def __init__(self, store: WeightStore, split: Split) -> None:
        self._store, self._cuts = store, split.cuts()

    def __getitem__(self, name: str) -> Weight:
        weight, cut = self._store[name], self._cuts.get(name)
        if cut is None:
            return weight
        if cut.rows:
            weight = weight.stacked(cut.rows)
        return weight if cut.columns is None else weight.columns(cut.columns)

    def stored_name(self, name: str) -> str:
        return self._store.stored_name(name)


def cut_form(form: WeightForm, cut: Cut) -> WeightForm:
    """The form of a part, without reading any of it."""
    num_rows, *inputs = form.shape
    scales = form.scales
    if cut.rows:
        whole, num_rows = num_rows, sum(part.stop - part.start for part in cut.rows)
        if scales is not None and scales[0] == whole:  # a scale per tensor holds for its parts
            scales = (num_rows, scales[1])
    if cut.columns is not None:
        begin, end = cut.columns.start, cut.columns.stop
        if scales is not None and scales[1] > 1:
            scales = (scales[0], (end - begin) // gcd(inputs[0] // scales[1], begin, end))
        inputs = [end - begin]
    return WeightForm(form.dtype, (num_rows, *inputs), scales, form.input_scale)


def input_unit(dtype: str, group_size: int) -> int:
    """Inputs of a weight that share a scale, in whole bytes; 1 where all do."""
    return lcm(group_size or 1, 2 if dtype == "int4" else 1)
