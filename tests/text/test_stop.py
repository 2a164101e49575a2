"""Stop strings across the borders of pieces."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageflight.core.errors import InvalidArgument
from pageflight.text.stop import StopMatcher, StopSequences, StopStrings


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(StopStrings(stops))
    shown = "".join(matcher.feed(piece) for piece in pieces)
    return shown + matcher.flush(), matcher.matched


def expected(stops: list[str], text: str) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


letters = st.text("ab\nc", max_size=6)


@settings(max_examples=600, deadline=None)
@given(
    stops=st.lists(st.text("ab\nc", min_size=1, max_size=5), min_size=1, max_size=6),
    pieces=st.lists(letters, max_size=8),
)
def test_result_is_that_of_a_search_in_the_whole_text(stops: list[str], pieces: list[str]) -> None:
    """A search inside each piece misses stop strings that span two, and depends on where tokens end."""
    assert run(stops, pieces) == expected(stops, "".join(pieces))


@settings(max_examples=400, deadline=None)
@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=5),
    pieces=st.lists(st.text("abc", max_size=4), max_size=8),
)
def test_only_what_could_become_a_stop_string_is_held_back(stops: list[str], pieces: list[str]) -> None:
    """Holding back as many characters as the longest stop string has delays every stream."""
    matcher, text, shown = StopMatcher(StopStrings(stops)), "", ""
    for piece in pieces:
        text += piece
        shown += matcher.feed(piece)
        if matcher.matched is not None:
            return
        held = text[len(shown) :]
        ends = [text[start:] for start in range(len(text)) if any(stop.startswith(text[start:]) for stop in stops)]
        assert held == (ends[0] if ends else "")


def test_nothing_is_shown_after_the_match() -> None:
    matcher = StopMatcher(StopStrings(["END"]))
    assert matcher.feed("one EN") == "one "
    assert matcher.feed("D two") == ""
    assert (matcher.matched, matcher.feed("three"), matcher.flush()) == ("END", "", "")


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="stop_words"):
        StopStrings(["a", ""])
    with pytest.raises(InvalidArgument, match="stop_words_list"):
        StopSequences([()])


def test_ten_thousand_stop_strings_cost_about_as_much_as_ten() -> None:
    """Testing every stop string at every piece made a token cost milliseconds. Ratio within one run, generous."""
    pieces = ["some words ", "and more of ", "them follow"] * 300

    def cost(count: int) -> float:
        stops = StopStrings([f"stop word number {number}" for number in range(count)])
        best = float("inf")
        for _ in range(3):
            matcher = StopMatcher(stops)
            start = time.perf_counter()
            for piece in pieces:
                matcher.feed(piece)
            best = min(best, time.perf_counter() - start)
        return best

    assert cost(10_000) < 20 * cost(10)


ids = st.integers(0, 2)


@settings(max_examples=400, deadline=None)
@given(
    sequences=st.lists(st.lists(ids, min_size=1, max_size=4), min_size=1, max_size=4),
    stream=st.lists(ids, max_size=16),
)
def test_id_sequences_are_found_at_their_last_id(sequences: list[list[int]], stream: list[int]) -> None:
    stops = StopSequences(sequences)
    held: tuple[int, ...] = ()
    for place, index in enumerate(stream, start=1):
        held, length = stops.advance(held, index)
        found = [len(s) for s in sequences if s == stream[max(0, place - len(s)) : place]]
        assert length == max(found, default=0)
        if length:
            return
        assert tuple(stream[place - len(held) : place]) == held
