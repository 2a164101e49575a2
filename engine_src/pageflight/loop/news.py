"""What frames of the core have brought for the sequences of one front, and nobody has looked at yet."""

from __future__ import annotations

from collections.abc import Mapping

from pageflight.core.plan import Finished
from pageflight.loop.frames import StepFrame, float32_of, int32_of, int64_of
from pageflight.loop.open_sequence import OpenSequence


class News:
    """Of the frames that arrived together: with a front that is behind, several tokens of a sequence become one."""

    def __init__(self) -> None:
        self.touched: dict[OpenSequence, None] = {}
        """Those with fresh ids."""
        self.ended: list[tuple[OpenSequence, Finished]] = []
        self.strangers: list[int] = []
        """Handles that ended and are not open."""

    def add(self, frame: StepFrame, open_sequences: Mapping[int, OpenSequence]) -> None:
        """Sequences whose end is decided get nothing more."""
        touched = self.touched
        handles, ids = int64_of(frame.handles).tolist(), int32_of(frame.ids).tolist()
        for handle, index in zip(handles, ids, strict=True):
            sequence = open_sequences.get(handle)
            if sequence is not None and sequence.ending is None:
                sequence.fresh.append(index)
                touched[sequence] = None
        if frame.log_probs is not None:
            for handle, log_prob in zip(handles, float32_of(frame.log_probs).tolist(), strict=True):
                sequence = open_sequences.get(handle)
                if sequence is not None and sequence.ending is None and sequence.generation.sampling.log_probs:
                    sequence.fresh_log_probs.append(log_prob)
        for finished in frame.finished:
            sequence = open_sequences.get(finished.handle)
            if sequence is not None:
                self.ended.append((sequence, finished))
            else:
                self.strangers.append(finished.handle)
