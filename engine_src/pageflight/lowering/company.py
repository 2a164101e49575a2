"""Does company change what a sequence gets? Asked of a loaded engine, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pageflight.lowering.base import CompiledModel
from pageflight.lowering.passes import Run, pack

NUM_BLOCKS = 5
"""Blocks that a Company writes to."""

_NUM_PROMPT, _NUM_OUTPUT = 70, 3
_SIZES = (1, 2, 3, 8, 17, 33, 64, 65, 130)


class Meeting(NamedTuple):
    """One pass: tokens [begin, end) of the text, and rows of others until it has `size` tokens."""

    begin: int
    end: int
    size: int
    with_chunk: bool = False  # among the others


class Company:
    """One text: computed with nobody beside it, then again and again in passes of many shapes.

    Its prompt fills two blocks and a part of a third; then it decodes. What a pass leaves in the blocks is read by
    those after it, so wrong keys and values show as well. `blocks` are NUM_BLOCKS that nobody else uses.
    """

    def __init__(self, model: CompiledModel, blocks: Sequence[int]) -> None:
        self._model = model
        self._table, self._others = blocks[:3], [blocks[3:4], blocks[4:5]]
        random = np.random.default_rng(41)
        self._ids: list[int] = random.integers(0, model.vocab_size, _NUM_PROMPT + _NUM_OUTPUT).tolist()
        self._crowd: list[int] = random.integers(0, model.vocab_size, 256).tolist()
        size = model.block_size
        prompt = [(begin, min(begin + size, _NUM_PROMPT)) for begin in range(0, _NUM_PROMPT, size)]
        self._decodes = [(position, position + 1) for position in range(_NUM_PROMPT, _NUM_PROMPT + _NUM_OUTPUT)]
        self._chunkings = (prompt, [(0, 2 * size), *prompt[2:]])
        self._alone = {end: self._logits(self._run(begin, end))[0] for begin, end in (*prompt, *self._decodes)}

    def first_difference(self, sizes: Sequence[int]) -> str | None:
        """Where logits differ from those the text has alone, in passes of `sizes` tokens; None: nowhere."""
        for meeting in self._meetings(sizes):
            before, after = self._beside(meeting)
            logits = self._logits(*before, self._run(meeting.begin, meeting.end), *after)
            line = sum(run.takes for run in before)
            if not np.array_equal(logits[line], self._alone[meeting.end]):
                length = meeting.end - meeting.begin
                what = "a decoding row" if length == 1 else f"a chunk of {length} tokens"
                return f"{what} has other logits in a pass of {meeting.size} tokens"
        return None

    def can_chain(self) -> bool:
        """Whether consecutive tokens of a sequence may be rows of one pass, each as if it decoded alone."""
        for begin, end in self._chunkings[0]:
            self._logits(self._run(begin, end))
        logits = self._logits(*(self._run(begin, end) for begin, end in self._decodes))
        return all(np.array_equal(row, self._alone[end]) for row, (_, end) in zip(logits, self._decodes, strict=True))

    def _meetings(self, sizes: Sequence[int]) -> Iterator[Meeting]:
        """The text from its beginning, as often as it takes to decode once in every size.

        Larger passes are costly: each size has one chunk, and the largest has the decoding row and a chunk of another.
        """
        of_chunks = chain((size for size in sizes[:-1] if size > 2 * self._model.block_size), repeat(0))
        decodes = [(size, size == sizes[-1]) for size in sizes]
        for first in range(0, len(decodes), _NUM_OUTPUT):
            for begin, end in self._chunkings[first // _NUM_OUTPUT % 2]:
                yield Meeting(begin, end, next(of_chunks))
            for (begin, end), (size, with_chunk) in zip(self._decodes, decodes[first:], strict=False):
                yield Meeting(begin, end, size, with_chunk)

    def _beside(self, meeting: Meeting) -> tuple[list[Run], list[Run]]:
        """Rows of others before and after the text's in a pass; every second one samples."""
        count = max(0, meeting.size - (meeting.end - meeting.begin))
        runs = []
        if meeting.with_chunk:
            length = min(self._model.block_size, count)
            runs.append(Run(self._crowd[:length], 0, self._others[1], False))
            count -= length
        runs += [Run([self._crowd[i % 256]], 0, self._others[0], i % 2 == 0) for i in range(count)]
        return runs[: len(runs) // 3], runs[len(runs) // 3 :]

    def _run(self, begin: int, end: int) -> Run:
        return Run(self._ids[begin:end], begin, self._table)

    def _logits(self, *runs: Run) -> NDArray[np.float32]:
        self._model.start(pack(runs, self._model.block_size))
        logits: NDArray[np.float32] = self._model.wait().copy()  # the engine keeps its own for the next pass
        return logits


def sizes_to_try(max_num_tokens: int, num_threads: int) -> list[int]:
    """Tokens of the passes: around the borders of tiles and threads, and the most that a step can have."""
    sizes = {*_SIZES, num_threads - 1, num_threads, num_threads + 1, max_num_tokens}
    return sorted(size for size in sizes if 1 <= size <= max_num_tokens)
