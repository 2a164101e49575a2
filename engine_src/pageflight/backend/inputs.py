"""The input tensors of a Triton request, row by row, as plain Python values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pageflight.backend import triton
from pageflight.backend.options import Options
from pageflight.core import wire
from pageflight.core.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a batched request, or all of an unbatched one: arrays without the batch dimension, by name."""

    index: int
    arrays: Mapping[str, NDArray[Any]]

    def text(self, name: str) -> bytes | str:
        """The one string of `name`. Raises InvalidArgument when it is missing."""
        values = self._scalar(name)
        if not isinstance(values, bytes | str):
            raise InvalidArgument(name, values, "must be text")
        return values

    def number(self, name: str, default: int) -> int:
        return int(self._scalar(name)) if name in self.arrays else default

    def flag(self, name: str) -> bool:
        return name in self.arrays and bool(self._scalar(name))

    def add_options(
        self, options: Options, tensors: Iterable[wire.Tensor], spellings: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Add those of `tensors` that carry an option and are there. `spellings`: how the client, who does not see
        these tensors, calls them, where it is otherwise."""
        for tensor in tensors:
            if not tensor.option or tensor.name not in self.arrays:
                continue
            spelling = spellings.get(tensor.name, tensor.name)
            values = self.arrays[tensor.name].ravel().tolist()
            if wire.OPTIONS[tensor.option].dims != wire.SCALAR:
                options.add(spelling, values, name=tensor.option)
            elif len(values) == 1:
                options.add(spelling, values[0], name=tensor.option)
            else:
                raise InvalidArgument(spelling, f"{len(values)} values", "must be one value")

    def _scalar(self, name: str) -> Any:
        array = self.arrays.get(name)
        if array is None:
            raise InvalidArgument(name, None, "is required")
        if array.size != 1:
            raise InvalidArgument(name, f"{array.size} values", "must be one value")
        return array.ravel().tolist()[0]


def rows_of(request: triton.TritonRequest, *, is_batched: bool) -> Iterator[Row]:
    """The rows of a request; one where there is no batch dimension. Raises InvalidArgument for an empty batch."""
    arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
    if not is_batched:
        yield Row(0, arrays)
        return
    sizes = {array.shape[0] if array.ndim else 0 for array in arrays.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise InvalidArgument("batch", sorted(sizes), "all inputs must have the same number of rows, at least 1")
    (size,) = sizes
    for index in range(size):
        yield Row(index, {name: array[index] for name, array in arrays.items()})


def parameters_of(request: triton.TritonRequest) -> dict[str, Any]:
    """The request's parameters of the KServe protocol: text, whole numbers, flags. Raises InvalidArgument."""
    text = request.parameters()
    try:
        parameters: dict[str, Any] = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise InvalidArgument("parameters", text, f"cannot be read: {error}") from None
    return parameters


def add_timeout(options: Options, request: triton.TritonRequest) -> None:
    """KServe's `timeout` of a request, in microseconds, is its `timeout_ms` where that is not given; 0 is none."""
    timeout_us = request.timeout()
    if timeout_us > 0 and "timeout_ms" not in options:
        options.add("timeout", min(-(-timeout_us // 1000), wire.INT32_MAX), name="timeout_ms")


def word_list(option: str, array: NDArray[Any]) -> tuple[tuple[int, ...], ...]:
    """Token sequences from TensorRT-LLM's form: row 0 holds ids, row 1 the cumulative ends, padded with -1."""
    if array.ndim != 2 or array.shape[0] != 2:
        raise InvalidArgument(option, array.shape, "must have shape [2, length]: ids and cumulative ends")
    ids, ends = array[0].tolist(), [end for end in array[1].tolist() if end >= 0]
    if len(ends) > wire.MAX_WORDS:
        raise InvalidArgument(option, f"{len(ends)} entries", f"at most {wire.MAX_WORDS} entries")
    starts = [0, *ends][: len(ends)]
    words = []
    for start, end in zip(starts, ends, strict=True):
        if not start <= end <= len(ids):
            raise InvalidArgument(option, end, f"ends must rise and be at most {len(ids)}")
        if start < end:
            words.append(tuple(ids[start:end]))
    return tuple(words)


def as_word_list(words: Iterable[tuple[int, ...]]) -> NDArray[np.int32]:
    """The inverse of `word_list`, [2, length] int32, length at least 1."""
    ids: list[int] = []
    ends: list[int] = []
    for word in words:
        ids += word
        ends.append(len(ids))
    length = max(1, len(ids), len(ends))
    array = np.full((2, length), -1, dtype=np.int32)
    array[0, : len(ids)] = ids
    array[0, len(ids) :] = 0
    array[1, : len(ends)] = ends
    return array
