"""Stop strings in a text that arrives in pieces.

Only the longest end of the text that could still become a stop string is held back, so a stop string never leaks and
nothing waits longer than it must. The result does not depend on where the pieces are cut: the text ends at the first
character that completes any stop string; of several completed there, the longest counts, and text before it is shown.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from pageflight.core.errors import InvalidArgument


class StopStrings:
    """A set of stop strings, shared by the sequences of a request.

    The sorted strings serve as the trie: a prefix test is one binary search, so 10,000 strings cost a sort to set up
    and nothing per character that does not begin one.
    """

    __slots__ = ("_sorted", "candidate", "last_characters", "lengths", "strings")

    def __init__(self, strings: Iterable[str]) -> None:
        self.strings = frozenset(strings)
        if "" in self.strings:
            raise InvalidArgument("stop_words", "", "a stop string must not be empty")
        self._sorted = sorted(self.strings)
        self.lengths = sorted({len(string) for string in self.strings}, reverse=True)
        self.last_characters = frozenset(string[-1] for string in self.strings)
        first_characters = {string[0] for string in self.strings}
        self.candidate = re.compile("[" + "".join(map(re.escape, sorted(first_characters))) + "]")

    def begins(self, text: str) -> bool:
        """Whether `text` is the beginning of a stop string (or all of it)."""
        place = bisect_left(self._sorted, text)
        return place < len(self._sorted) and self._sorted[place].startswith(text)

    def ends(self, text: str) -> int:
        """Length of the longest stop string that `text` ends with; 0 when there is none."""
        if text[-1] in self.last_characters:
            for length in self.lengths:
                if length <= len(text) and text[-length:] in self.strings:
                    return length
        return 0


class StopMatcher:
    """Search state of one sequence."""

    __slots__ = ("_held", "_stops", "matched")

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the text."""

    def feed(self, text: str) -> str:
        """The text that can be shown now that `text` has arrived; nothing more once `matched` is set."""
        if self.matched is not None:
            return ""
        stops, held = self._stops, self._held
        shown: list[str] = []
        place, end = 0, len(text)
        while place < end:
            if not held:
                found = stops.candidate.search(text, place)
                if found is None:
                    shown.append(text[place:])
                    break
                shown.append(text[place : found.start()])
                place = found.start()
            held += text[place]
            place += 1
            if not stops.begins(held):
                kept = self._longest_beginning(held)
                shown.append(held[: len(held) - len(kept)])
                held = kept
            length = stops.ends(held) if held else 0
            if length:
                self.matched = held[-length:]
                shown.append(held[:-length])
                held = ""
                break
        self._held = held
        return "".join(shown)

    def flush(self) -> str:
        """What was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, held: str) -> str:
        for found in self._stops.candidate.finditer(held, 1):
            rest = held[found.start() :]
            if self._stops.begins(rest):
                return rest
        return ""


class StopSequences:
    """Stop sequences of token ids (the rows of TensorRT-LLM's `stop_words_list`)."""

    __slots__ = ("_lengths", "_prefixes", "_sequences")

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        self._sequences = frozenset(tuple(sequence) for sequence in sequences)
        if () in self._sequences:
            raise InvalidArgument("stop_words_list", [], "a stop sequence must not be empty")
        self._prefixes = frozenset(s[:length] for s in self._sequences for length in range(1, len(s) + 1))
        self._lengths = sorted({len(sequence) for sequence in self._sequences}, reverse=True)

    def advance(self, held: tuple[int, ...], index: int) -> tuple[tuple[int, ...], int]:
        """After `held`, id `index` arrives: the longest end that begins a stop sequence, and the length of the longest
        stop sequence that is complete there (0: none)."""
        held = (*held, index)
        while held and held not in self._prefixes:
            held = held[1:]
        for length in self._lengths:
            if length <= len(held) and held[-length:] in self._sequences:
                return held, length
        return held, 0
